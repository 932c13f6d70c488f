"""Ways to train one decoder on one GPU: ours, and peers in the best setting that they offer.

Each is a function of a case and a kind of activation checkpointing. It returns the module on the
device, and a function that looks at a batch once (masks, offsets of documents: a batch does not
change here) and returns another one, which computes the mean loss of that batch.
"""

import importlib.util
import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from training_peers import litgpt_config, smollm3_config

from smol.losses import linear_cross_entropy
from smol.model import Decoder, DecoderConfig, RopeConfig
from smol.model.attention import causal_document_mask, cumulative_lengths, document_positions
from smol.model.float8 import convert_to_float8

SMOLLM2 = {"vocab_size": 49_152, "num_kv_heads": 3, "tie_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "135m": SMOLLM2
    | {"hidden_size": 576, "num_layers": 30, "num_heads": 9, "intermediate_size": 1536},
    "360m": SMOLLM2
    | {"hidden_size": 960, "num_layers": 32, "num_heads": 15, "num_kv_heads": 5}
    | {"intermediate_size": 2560},
    "1b": {"vocab_size": 128_256, "hidden_size": 2048, "num_layers": 16, "num_heads": 16}
    | {"num_kv_heads": 4, "intermediate_size": 8192, "tie_embeddings": True},
    "3b": {"vocab_size": 128_256, "hidden_size": 2048, "num_layers": 36, "num_heads": 16}
    | {"num_kv_heads": 4, "intermediate_size": 11_008, "nope": 4, "tie_embeddings": True},
    "smallest": {"vocab_size": 64, "hidden_size": 32, "num_layers": 2, "num_heads": 2}
    | {"num_kv_heads": 1, "intermediate_size": 64, "nope": 2},
}
THETA = 50_000.0
MEAN_DOCUMENT = 1000  # tokens


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Attributes:
        way: A key of ``WAYS``.
        model: A key of ``MODELS``.
        context: Tokens of a row.
        attention: The way's own name of a backend, see ``attentions``.
        compile: ``none``, ``block`` (each by itself) or ``whole``.
        float8: Recipe of ``smol.model.float8``, for ours.
    """

    way: str
    model: str
    context: int
    attention: str
    compile: str
    float8: str = "none"

    @property
    def config(self) -> DecoderConfig:
        """Shape of the decoder."""
        return DecoderConfig(**MODELS[self.model])

    @property
    def documents_apart(self) -> bool:
        """Whether a token sees its own document only, and not the whole row before it."""
        return self.way == "smol" or self.attention != "sdpa"


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents; tensors are ``(rows, context)`` int64.

    Attributes:
        tokens: Inputs.
        targets: The token after each.
        documents: Number of the document that a token is of.
        lengths: Of the documents, row after row; none crosses a row.
    """

    tokens: Tensor
    targets: Tensor
    documents: Tensor
    lengths: tuple[int, ...]


Prepare = Callable[[Batch], Callable[[], Tensor]]


def make_batch(case: Case, rows: int, device: torch.device) -> Batch:
    """Random tokens in documents of random lengths, the same ones for all ways."""
    rng, lengths = random.Random(0), []
    for _ in range(rows):
        left = case.context
        while left:
            lengths.append(min(left, 1 + int(rng.expovariate(1 / MEAN_DOCUMENT))))
            left -= lengths[-1]
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    generator = torch.Generator().manual_seed(1)
    shape = (rows, case.context + 1)
    blocks = torch.randint(case.config.vocab_size, shape, generator=generator).to(device)
    return Batch(
        blocks[:, :-1].contiguous(),
        blocks[:, 1:].contiguous(),
        numbers.view(rows, case.context).to(device),
        tuple(lengths),
    )


def smol(case: Case, checkpointing: str, device: torch.device) -> tuple[nn.Module, Prepare]:
    """Our decoder and chunked loss."""
    with torch.device("meta"):
        decoder = Decoder(case.config, RopeConfig(theta=THETA), case.attention, checkpointing)
    # A processor can only emulate float8: enough to show that everything runs.
    convert_to_float8(decoder, case.float8, device, emulate=device.type == "cpu")
    if case.compile == "block":
        for layer in decoder.model.layers:
            layer.compile()
    elif case.compile == "whole":
        decoder.compile()
    decoder.to_empty(device=device)

    def prepare(batch: Batch) -> Callable[[], Tensor]:
        head = partial(linear_cross_entropy, targets=batch.targets, ignore_index=None)
        return lambda: decoder(batch.tokens, documents=batch.documents, head=head)[0].mean()

    return decoder, prepare


def transformers(case: Case, checkpointing: str, device: torch.device) -> tuple[nn.Module, Prepare]:
    """``SmolLM3ForCausalLM`` as the Trainer compiles it.

    With flash attention the batch is one row without padding, as its collator for packed text lays
    it out; with FlexAttention the mask is made outside of the compiled model.
    """
    from transformers import SmolLM3ForCausalLM

    with device:
        model = SmolLM3ForCausalLM(
            smollm3_config(MODELS[case.model], THETA, case.context, case.attention)
        )
    if checkpointing == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.compile != "none":
        model.compile()

    def prepare(batch: Batch) -> Callable[[], Tensor]:
        tokens, targets, options = batch.tokens, batch.targets, {}
        if case.documents_apart:
            options["position_ids"] = document_positions(batch.documents)
        if case.attention == "flex_attention":
            options["attention_mask"] = _block_mask(batch)
        elif case.documents_apart:
            offsets, longest = cumulative_lengths(list(batch.lengths), device), max(batch.lengths)
            tokens, targets = tokens.view(1, -1), targets.view(1, -1)
            options = {
                "position_ids": options["position_ids"].view(1, -1),
                "cu_seq_lens_q": offsets,
                "cu_seq_lens_k": offsets,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        return lambda: model(input_ids=tokens, labels=targets, shift_labels=targets, **options).loss

    return model, prepare


def liger(case: Case, checkpointing: str, device: torch.device) -> tuple[nn.Module, Prepare]:
    """The same with Liger's kernels (``use_liger_kernel`` of the Trainer), no whole logits."""
    from liger_kernel.transformers import apply_liger_kernel_to_smollm3

    apply_liger_kernel_to_smollm3()
    return transformers(case, checkpointing, device)


def litgpt(case: Case, checkpointing: str, device: torch.device) -> tuple[nn.Module, Prepare]:
    """litgpt's ``GPT`` and ``chunked_cross_entropy`` as ``litgpt pretrain`` calls them."""
    from litgpt.model import GPT, Block
    from litgpt.utils import chunked_cross_entropy
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        apply_activation_checkpointing,
    )

    with device:
        module = GPT(litgpt_config(MODELS[case.model], THETA, case.context))
    module.transformer.wte.weight = module.lm_head.weight
    if checkpointing == "full":  # as its activation_checkpointing_policy of blocks does
        apply_activation_checkpointing(module, check_fn=lambda m: isinstance(m, Block))
    model = torch.compile(module) if case.compile != "none" else module

    def prepare(batch: Batch) -> Callable[[], Tensor]:
        return lambda: chunked_cross_entropy(model(batch.tokens), batch.targets)

    return module, prepare


def torchtitan(case: Case, checkpointing: str, device: torch.device) -> tuple[nn.Module, Prepare]:
    """torchtitan's Llama 3 (0.2.2), its own checkpointing and compilation, the head tied."""
    from torchtitan.components.loss import cross_entropy_loss
    from torchtitan.config.job_config import ActivationCheckpoint, Compile
    from torchtitan.models.attention import VarlenMetadata
    from torchtitan.models.llama3.infra.parallelize import (
        _op_sac_save_list,
        apply_ac,
        apply_compile,
    )
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    shape, config = MODELS[case.model], case.config
    args = TransformerModelArgs(
        dim=config.hidden_size,
        n_layers=config.num_layers,
        n_heads=config.num_heads,
        n_kv_heads=config.num_kv_heads,
        vocab_size=config.vocab_size,
        multiple_of=shape["intermediate_size"],  # a small multiplier is rounded up to this width
        ffn_dim_multiplier=0.1,
        rope_theta=THETA,
        max_seq_len=case.context,
        attn_type=case.attention,
        attn_mask_type="block_causal" if case.documents_apart else "causal",
    )
    with device:
        model = Transformer(args)
    model.output.weight = model.tok_embeddings.weight
    compiled = case.compile != "none"
    if checkpointing != "none":
        kind = ActivationCheckpoint(mode=checkpointing, selective_ac_option="op")
        saved = _op_sac_save_list
        apply_ac(model, kind, model_compile_enabled=compiled, op_sac_save_list=saved)
    if compiled:
        apply_compile(model, Compile(enable=True))
    total = torch.compile(cross_entropy_loss) if compiled else cross_entropy_loss

    def prepare(batch: Batch) -> Callable[[], Tensor]:
        masks = None
        if case.attention == "flex":
            masks = _block_mask(batch)
        elif case.attention == "varlen":
            offsets, longest = cumulative_lengths(list(batch.lengths), device), max(batch.lengths)
            masks = VarlenMetadata(offsets, offsets, longest, longest)
        tokens = batch.targets.numel()
        return lambda: total(model(batch.tokens, attention_masks=masks), batch.targets) / tokens

    return model, prepare


def _block_mask(batch: Batch) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    (rows, time), mask_mod = batch.tokens.shape, causal_document_mask(batch.documents)
    device = batch.tokens.device
    return torch.compile(create_block_mask)(mask_mod, rows, None, time, time, device=device)


WAYS: dict[str, Callable[[Case, str, torch.device], tuple[nn.Module, Prepare]]] = {
    "smol": smol,
    "transformers": transformers,
    "liger": liger,
    "litgpt": litgpt,
    "torchtitan": torchtitan,
}
PACKAGES = {"liger": "liger_kernel"}
"""What a way needs, where the name of the package is not that of the way."""
CHECKPOINTING = {
    way: ("none", "selective", "full") if way in ("smol", "torchtitan") else ("none", "full")
    for way in WAYS
}
"""The kinds of activation checkpointing that a way has, by the memory that they take."""
COMPILED = {"transformers": "whole", "liger": "whole", "litgpt": "whole", "torchtitan": "block"}
"""What peers compile at once."""


def is_installed(way: str) -> bool:
    """Whether the package of a way can be imported here."""
    return importlib.util.find_spec(PACKAGES.get(way, way)) is not None


def attentions(way: str) -> list[str]:
    """The attention backends of a peer that can train here, best first.

    A processor has ``sdpa`` only; flash attention of transformers is a package of its own.
    """
    if way == "litgpt" or not torch.cuda.is_available():
        return ["sdpa"]
    if way == "torchtitan":
        from torch.nn.attention.varlen import varlen_attn

        causal = "window_size" in inspect.signature(varlen_attn).parameters
        return ["varlen", "flex", "sdpa"] if causal else ["flex", "sdpa"]
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    flash = {3: is_flash_attn_3_available(), 2: is_flash_attn_2_available()}
    return [f"flash_attention_{n}" for n in flash if flash[n]] + ["flex_attention", "sdpa"]
