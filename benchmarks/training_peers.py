"""One way to train a decoder, in a process of its own, told over its standard input what to do.

``training_step.py`` starts it as ``python training_peers.py JOB`` (JOB is JSON, see ``Job``) with
the interpreter of the environment that the peer is installed in. It prints one line of JSON when it
is ready, one for each line it reads (a number of steps, answered by their seconds), and one with
its peak memory when the input ends. Everything else it prints goes to the standard error.
"""

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Of the optimiser, for all ways: those of configs/base.yaml.
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass
class Job:
    """What is trained, and how.

    Attributes:
        way: A key of ``WAYS``.
        decoder: Fields of :class:`smol.model.DecoderConfig`.
        theta: Base of the rotary embedding.
        rows: Sequences in a batch.
        lengths: Of the packed documents, in tokens, row after row; none crosses a row.
        autocast: Products in bfloat16, weights in float32; otherwise all in float32.
        compile: Compile the model the way that this peer does it.
        process_time: Take processor time instead of time, for a machine that is not quiet.
    """

    way: str
    decoder: dict[str, Any]
    theta: float
    rows: int
    lengths: Sequence[int]
    autocast: bool
    compile: bool = False
    process_time: bool = False

    @property
    def time(self) -> int:
        """Tokens of a row."""
        return sum(self.lengths) // self.rows


Loss = Callable[[Tensor, Tensor], Tensor]
"""Inputs and targets, each ``(rows, time)``, to the mean loss."""


def smol(job: Job) -> tuple[nn.Module, Loss]:
    """Our decoder and loss; documents do not see each other."""
    from smol.losses import linear_cross_entropy
    from smol.model import Decoder, DecoderConfig, RopeConfig, init_weights
    from smol.modules.host_memory import keep_freed_memory

    torch.set_flush_denormal(True)  # both as DecoderModule does
    keep_freed_memory()
    model = Decoder(DecoderConfig(**job.decoder), RopeConfig(theta=job.theta))
    init_weights(model, seed=0)
    numbers = torch.arange(len(job.lengths)).repeat_interleave(torch.tensor(job.lengths))
    documents = numbers.view(job.rows, -1)
    if job.compile:
        for layer in model.model.layers:
            layer.compile()

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        head = partial(linear_cross_entropy, targets=targets, ignore_index=None)
        return model(tokens, documents=documents, head=head)[0].mean()

    return model, loss


def smollm3_config(shape: dict[str, Any], theta: float, context: int, attention: str) -> Any:
    """The ``SmolLM3Config`` of a decoder.

    Args:
        shape: Fields of :class:`smol.model.DecoderConfig`.
        theta: Base of the rotary embedding.
        context: Tokens of a row.
        attention: ``attn_implementation``.
    """
    from transformers import SmolLM3Config

    layers, every = shape["num_layers"], shape.get("nope") or 0
    return SmolLM3Config(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        no_rope_layers=[int(not every or (i + 1) % every != 0) for i in range(layers)],
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        max_position_embeddings=context,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
    )


def transformers(job: Job) -> tuple[nn.Module, Loss]:
    """``SmolLM3ForCausalLM``, scaled-dot-product attention, causal over the whole row."""
    from transformers import SmolLM3ForCausalLM

    model = SmolLM3ForCausalLM(smollm3_config(job.decoder, job.theta, job.time, "sdpa"))
    if job.compile:
        model.compile()

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return model(input_ids=tokens, shift_labels=targets, labels=targets).loss

    return model, loss


def litgpt_config(shape: dict[str, Any], theta: float, context: int) -> Any:
    """The ``litgpt.config.Config`` of a decoder; arguments as for :func:`smollm3_config`."""
    from litgpt.config import Config

    return Config(
        n_layer=shape["num_layers"],
        n_embd=shape["hidden_size"],
        n_head=shape["num_heads"],
        n_query_groups=shape["num_kv_heads"],
        intermediate_size=shape["intermediate_size"],
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        block_size=context,
        rope_base=int(theta),
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        parallel_residual=False,
        rotary_percentage=1.0,
        bias=False,
    )


def litgpt(job: Job) -> tuple[nn.Module, Loss]:
    """litgpt's ``GPT`` and ``chunked_cross_entropy`` with the defaults of ``litgpt pretrain``."""
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    module = GPT(litgpt_config(job.decoder, job.theta, job.time))
    module.transformer.wte.weight = module.lm_head.weight
    model = torch.compile(module) if job.compile else module

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return chunked_cross_entropy(model(tokens), targets)

    return module, loss


WAYS: dict[str, Callable[[Job], tuple[nn.Module, Loss]]] = {
    "smol": smol,
    "transformers": transformers,
    "litgpt": litgpt,
}


class Training:
    """Steps on random tokens: forward, backward, clipping, fused AdamW."""

    def __init__(self, job: Job) -> None:
        torch.manual_seed(0)
        self.job = job
        self.model, self.loss = WAYS[job.way](job)
        self.model.train()
        vocab = job.decoder["vocab_size"]
        generator = torch.Generator().manual_seed(1)  # the same tokens for all ways
        tokens = torch.randint(vocab, (job.rows, job.time + 1), generator=generator)
        self.tokens, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
        )

    @property
    def parameters(self) -> int:
        """How many there are; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def step(self) -> float:
        """Take a step and return the loss before it."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.job.autocast):
            loss = self.loss(self.tokens, self.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def main() -> None:
    """Answer the lines of the standard input."""
    job = Job(**json.loads(sys.argv[1]))
    clock = time.process_time if job.process_time else time.perf_counter
    answers = os.fdopen(os.dup(1), "w")
    with contextlib.redirect_stdout(sys.stderr):
        training = Training(job)
        loss = training.step()  # compiles, and takes the memory of the moments
        ready = {"loss": loss, "parameters": training.parameters, "torch": torch.__version__}
        print(json.dumps(ready), file=answers, flush=True)
        for line in sys.stdin:
            began = clock()
            for _ in range(int(line)):
                training.step()
            print(json.dumps(clock() - began), file=answers, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB
    print(json.dumps(peak), file=answers, flush=True)


if __name__ == "__main__":
    main()
