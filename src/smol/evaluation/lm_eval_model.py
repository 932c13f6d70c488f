"""Our models in EleutherAI's lm-evaluation-harness, without an export.

The harness needs ``pip install lm-eval`` and learns the name ``smol`` when this module is imported:

.. code-block:: python

    import lm_eval
    from smol.evaluation.lm_eval_model import SmolLM

    lm_eval.simple_evaluate(SmolLM("runs/stage3"), tasks=["hellaswag"])
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from smol.evaluation.language_model import load_language_model
from smol.evaluation.model_folder import find_model
from smol.generation import Sampling

MAX_NEW_TOKENS = 256


@register_model("smol")
class SmolLM(TemplateLM):
    """A run, a checkpoint or a Hugging Face folder as a model of the harness.

    Texts are tokenised as by the harness's own class for transformers, ``HFLM``: nothing is put
    before a context that is not empty, unless the tokenizer does so itself.

    Args:
        path: Folder of the model.
        tokenizer: Folder of the tokenizer, where it is not the one that goes with the model.
        device: Where to compute.
        dtype: Of the weights, such as ``bfloat16``; ``None`` keeps what they are stored in.
        max_length: How many tokens the model may read; ``None`` for what it was trained with.
        batch_size: How many texts to write at a time.
        batch_tokens: How many tokens to score at a time, about.

    Raises:
        UserError: If there is no such model, or no tokenizer is known.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | None = None,
        device: str = "cpu",
        dtype: str | None = None,
        max_length: int | None = None,
        batch_size: int = 16,
        batch_tokens: int = 4096,
        **_: Any,  # the harness passes more than it was given
    ) -> None:
        super().__init__()
        self.folder = find_model(path, tokenizer)
        self.model = load_language_model(
            self.folder, device, dtype and getattr(torch, dtype), max_length
        )
        self.model.batch_size, self.model.batch_tokens = int(batch_size), int(batch_tokens)
        self._device = torch.device(device)
        self._begin = self.model.tokenizer.backend.encode("").ids

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.model.max_length

    @property
    def tokenizer_name(self) -> str:
        return str(self.folder.tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        tokens = self.model.tokenizer.encode(string, special_tokens=True)
        begin = [] if add_special_tokens is False else self._begin
        return tokens if tokens[: len(begin)] == begin else [*begin, *tokens]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        scores = self.model.score_tokens([(context, text) for _, context, text in requests])
        answers = [(score.log_prob, score.greedy) for score in scores]
        for (key, *_), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        texts = [self.tok_encode(*request.args) for request in requests]
        return [s.log_prob for s in self.model.score_whole(texts, self.prefix_token_id)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        alike: dict[Sampling, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(_sampling(request.args[1]), []).append(index)
        for sampling, indices in alike.items():
            prompts = [self.tok_encode(requests[index].args[0]) for index in indices]
            prompts = [prompt or [self.prefix_token_id] for prompt in prompts]
            completions = self.model.generate(prompts, sampling)
            for index, completion in zip(indices, completions, strict=True):
                texts[index] = self._text(completion.tokens, sampling.stop)
                self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return texts

    def _text(self, tokens: list[int], stop: Sequence[str]) -> str:
        """The text up to the first stop string; special tokens are no part of it."""
        text = self.model.tokenizer.decode(tokens, skip_special_tokens=True)
        return min((text.partition(string)[0] for string in stop), key=len, default=text)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        template = self.model.template
        return template.source if chat_template and template is not None else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.model.template.render(chat_history, add_generation_prompt=add_generation_prompt)


def _sampling(arguments: dict[str, Any]) -> Sampling:
    given = normalize_gen_kwargs(arguments, MAX_NEW_TOKENS)
    return Sampling(
        temperature=given.get("temperature", 0.0),
        top_p=given.get("top_p"),
        top_k=given.get("top_k") or None,
        max_new_tokens=given["max_gen_toks"],
        stop=tuple(filter(None, given.get("until", []))),
    )
