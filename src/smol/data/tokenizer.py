"""Tokenizers: a byte-level BPE trained on the spot, or any folder with a ``tokenizer.json``."""

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smol.data.card import write_json
from smol.errors import UserError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|pad|>")
# Not special to a decoder: a reader of the model's reasoning wants to see them.
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
RESERVED = 8
VOCAB_MULTIPLE = 128
KNOWN_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<|eot_id|>", "<|im_end|>")


class Tokenizer:
    """A ``tokenizer.json`` with the ids that training needs.

    Args:
        backend: The tokenizer of the ``tokenizers`` library.
        eos_token: The token that ends a document.
        bos_token: The token that begins a text, if the tokenizer names one.
        digest: SHA-256 of the tokenizer's content, whatever folder it lies in.

    Raises:
        UserError: ``eos_token`` or ``bos_token`` is not in the vocabulary.
    """

    def __init__(
        self, backend: "tokenizers.Tokenizer", eos_token: str, bos_token: str | None, digest: str
    ) -> None:
        # Special, so that the same letters in a text are encoded as text and end no document.
        backend.add_special_tokens([eos_token])
        self.backend = backend
        self.digest = digest
        self.eos_id: int = self._id(eos_token)
        self.bos_id: int | None = None if bos_token is None else self._id(bos_token)

    def _id(self, token: str) -> int:
        if (number := self.backend.token_to_id(token)) is None:
            raise UserError(f"the tokenizer has no token '{token}' in its vocabulary.")
        return number

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """Return the ids of a text, with nothing put before or after.

        Args:
            text: The text.
            special_tokens: Read ``<|im_start|>`` and the like in the text as the tokens of that
                name. Off by default, so that no text can forge the end of a document.
        """
        return self.encode_batch([text], special_tokens)[0]

    def encode_batch(self, texts: list[str], special_tokens: bool = False) -> list[list[int]]:
        """Return the ids of several texts."""
        self.backend.encode_special_tokens = not special_tokens
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Return the text of a sequence of ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def describe(self) -> dict[str, Any]:
        """Return what a card says of the tokenizer."""
        return {
            "digest": self.digest,
            "vocab_size": self.vocab_size,
            "eos_id": self.eos_id,
            "bos_id": self.bos_id,
        }


def load_tokenizer(path: str | Path, eos_token: str | None = None) -> Tokenizer:
    """Load a tokenizer from a folder, a ``tokenizer.json``, or by its name on the hub.

    Args:
        path: The folder, the file, or a hub name such as ``HuggingFaceTB/SmolLM3-3B``.
        eos_token: Ends a document; by default what ``tokenizer_config.json`` names.

    Raises:
        UserError: There is no such tokenizer, it is broken, or it has no end-of-text token.
    """
    from tokenizers import Tokenizer as Backend

    file = _locate(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for a file it cannot use
        raise UserError(f"{file} is not a tokenizer ({str(error).splitlines()[0]}).") from None
    backend.no_truncation()
    backend.no_padding()
    named = _named_tokens(file.parent)
    vocab = backend.get_vocab(with_added_tokens=True)
    eos = eos_token or named.get("eos_token")
    eos = eos or next((token for token in KNOWN_END_TOKENS if token in vocab), None)
    if eos is None or eos not in vocab:
        expected = f"'{eos}'" if eos else f"one of {', '.join(KNOWN_END_TOKENS)}"
        raise UserError(
            f"{file} has no end-of-text token: expected {expected} in its vocabulary, "
            "or give --eos_token."
        )
    for padding in ("truncation", "padding"):
        content.pop(padding, None)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Tokenizer(backend, eos, named.get("bos_token"), digest)


def _locate(path: str | Path) -> Path:
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if file.is_file():
        return file
    name = str(path)
    if Path(path).is_dir() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"{path} has no tokenizer.json: train one with "
            f"python src/prepare.py --tokenizer {path} --vocab_size 4096 --documents ..."
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["tokenizer.json", "tokenizer_config.json"]
        return Path(snapshot_download(name, allow_patterns=patterns)) / "tokenizer.json"
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is neither a folder with a tokenizer.json nor a tokenizer the hub gives "
            f"({type(error).__name__}: {reason})"
        ) from None


def _named_tokens(folder: Path) -> dict[str, str]:
    """Return the tokens that ``tokenizer_config.json`` gives a role (a name or an added token)."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return {}
    config = json.loads(file.read_text(encoding="utf-8"))
    roles = {role: config.get(role) for role in ("eos_token", "bos_token")}
    return {
        role: token["content"] if isinstance(token, dict) else token
        for role, token in roles.items()
        if token
    }


def train_tokenizer(
    texts: Iterable[str], folder: str | Path, vocab_size: int = 4096, min_frequency: int = 2
) -> Tokenizer:
    """Train a byte-level BPE that splits digits one by one, and save it.

    The folder also loads in ``transformers.AutoTokenizer``. Special tokens come first, so that
    ``<|endoftext|>`` is 0 whatever the vocabulary; where the texts are too few for the size asked,
    unused tokens fill it up.

    Args:
        texts: What to learn from.
        folder: Where ``tokenizer.json`` and ``tokenizer_config.json`` go.
        vocab_size: Ids in all, a multiple of 128.
        min_frequency: How often a pair must occur to become a token.

    Returns:
        The tokenizer as ``load_tokenizer`` gives it.

    Raises:
        UserError: ``vocab_size`` is not a multiple of 128, or too small.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    reserved = [f"<|reserved_{i}|>" for i in range(RESERVED)]
    added = [
        AddedToken(token, special=True, normalized=False)
        for token in (*SPECIAL_TOKENS, *MARKERS, *reserved)
    ]
    least = -(-(len(added) + len(alphabet)) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if vocab_size % VOCAB_MULTIPLE or vocab_size < least:
        up = max(least, -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE)
        raise UserError(
            f"vocab_size is {vocab_size}, expected a multiple of {VOCAB_MULTIPLE} and at least "
            f"{least}: try --vocab_size {up}"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=added,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    missing = vocab_size - backend.get_vocab_size(with_added_tokens=True)
    backend.add_special_tokens([f"<|unused_{i}|>" for i in range(missing)])
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] not in MARKERS

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # tokenizer.json is written last: the folder is usable only with both.
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_TEXT,
            "bos_token": None,
            "pad_token": "<|pad|>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1 << 30,
        },
    )
    write_json(folder / "tokenizer.json", content)
    return load_tokenizer(folder)
