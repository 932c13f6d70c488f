"""The LightningDataModule of pretraining: stages of mixtures of prepared token streams."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from smol.data.card import Card
from smol.data.curriculum import Curriculum, check_history
from smol.data.held_out import HeldOut
from smol.data.loader import PositionLoader
from smol.data.positioned import PositionedData
from smol.data.spans import SourceOrder
from smol.data.stages import Segment, StageConfig, check_positive, plan, with_contexts
from smol.data.streams import ChunkCache, TokenStream
from smol.data.tokenizer import Tokenizer, load_tokenizer
from smol.errors import UserError
from smol.paths import is_url, resolve

EPOCHS_TO_WARN = 4  # repeating data more often than that is reported to stop paying


class Pretraining(PositionedData):
    """Packed token streams, mixed and staged.

    The global batch is given in tokens; sequences per pass and accumulation follow from it, from
    the context and from how many processes share the data.

    Args:
        stages: Stages by name, each with its mixture; ``null`` removes one.
        tokenizer: Folder with the ``tokenizer.json`` that the sources were prepared with.
        context_length: Tokens per sequence, unless a stage says otherwise.
        global_batch_tokens: Tokens per optimiser step, unless a stage says otherwise.
        micro_batch_tokens: Tokens of one forward and backward pass of one process.
        seed: Seed of the order of the data.
        shortest_context: Unit of the order; by default the shortest context of any stage.
        longest_context: Longest context this run may ever use; by default that of any stage.
        chunk_window: Chunks of a source that are read from at a time. More shuffle better, fewer
            spare an object store.
        num_workers: Processes that read ahead.
        held_out_tokens: Tokens of each source's held-out text that validation reads; ``test`` reads
            all of them.
        embedded: Folder of the embedded corpora, which are prepared when missing; ``null`` if no
            source needs them.
        embedded_vocab_size: Vocabulary of the tokenizer that is trained with them.
        cache_dir: Where chunks of remote sources are kept.
        cache_gigabytes: How much they may take.
        storage_options: Passed to fsspec for remote sources (endpoint, credentials).
        verify: Compare each chunk with the SHA-256 of its card when it is first opened.
        allow_changed_data: Go on although a source that was already read has other content now.
        document_masking: Whether tokens attend within their document only, and positions begin anew
            with each; if not, rows are trained on as one. Held-out text is always read by document.
    """

    def __init__(
        self,
        stages: dict[str, StageConfig | None],
        tokenizer: str,
        context_length: int,
        global_batch_tokens: int,
        micro_batch_tokens: int,
        seed: int = 6,
        shortest_context: int | None = None,
        longest_context: int | None = None,
        chunk_window: int = 4,
        num_workers: int = 0,
        held_out_tokens: int = 2**17,
        embedded: str | None = None,
        embedded_vocab_size: int = 4096,
        cache_dir: str = "data/cache",
        cache_gigabytes: float = 50.0,
        storage_options: dict[str, Any] | None = None,
        verify: bool = True,
        allow_changed_data: bool = False,
        document_masking: bool = True,
    ):
        super().__init__()
        for key, number in {
            "context_length": context_length,
            "global_batch_tokens": global_batch_tokens,
            "micro_batch_tokens": micro_batch_tokens,
            "shortest_context": shortest_context,
            "longest_context": longest_context,
            "chunk_window": chunk_window,
        }.items():
            check_positive(f"data.{key}", number)
        if seed < 0 or num_workers < 0:
            raise UserError(
                f"data.seed is {seed}, data.num_workers is {num_workers}; expected 0 or more"
            )
        self._stages_given = {name: stage for name, stage in stages.items() if stage is not None}
        self.stages = self._stages_given
        self._range_given = (shortest_context, longest_context)
        self.tokenizer_path = tokenizer
        self.context_length = context_length
        self.global_batch_tokens = global_batch_tokens
        self.micro_batch_tokens = micro_batch_tokens
        self.seed = seed
        self.chunk_window = chunk_window
        self.num_workers = num_workers
        self.held_out_tokens = held_out_tokens
        self.embedded = embedded
        self.embedded_vocab_size = embedded_vocab_size
        self.verify = verify
        self.allow_changed_data = allow_changed_data
        self.document_masking = document_masking
        self.cache = ChunkCache(cache_dir, int(cache_gigabytes * 1e9), storage_options)
        self.tokenizer: Tokenizer | None = None
        self._streams: dict[str, TokenStream] = {}

    # -- set-up ----------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Prepare the embedded corpora where they are missing (one process of each machine)."""
        if self.embedded is not None:
            from smol.data.corpora import ensure_embedded

            paths = [s.path for stage in self.stages.values() for s in stage.sources.values()]
            ensure_embedded(
                resolve(self.embedded), self.embedded_vocab_size, log=rank_zero_info, paths=paths
            )

    def setup(self, stage: str | None = None) -> None:
        """Open tokenizer and sources, and check that they belong together."""
        if self._streams:
            return
        self.tokenizer = load_tokenizer(resolve(self.tokenizer_path))
        for stage_name, config in self.stages.items():
            for name, source in config.sources.items():
                known = self._streams.get(name)
                if known is None:
                    stream = TokenStream(source.path, cache=self.cache, verify=self.verify)
                    self._check_source(name, stream.card)
                    self._streams[name] = stream
                elif known.path != str(resolve(source.path)):
                    raise UserError(
                        f"source '{name}' has another path in stage '{stage_name}' ({source.path}) "
                        f"than before ({known.path}); give it another name there"
                    )
        self._check_cache()

    def schedule_contexts(self, contexts: Mapping[int, int], unit: str) -> None:
        """Change context in the midst of stages; to be called before the first batch.

        Args:
            contexts: Context length from each optimiser step, or token, on.
            unit: ``"steps"`` or ``"tokens"``.
        """
        self.stages = with_contexts(self._stages_given, contexts, unit)
        self.__dict__.pop("orders", None)

    @property
    def shortest_context(self) -> int:
        """Unit of the order of the data."""
        return self._range_given[0] or min(self._contexts, default=self.context_length)

    @property
    def longest_context(self) -> int:
        """What the order of the data is made for."""
        return self._range_given[1] or max(self._contexts, default=self.context_length)

    @property
    def _contexts(self) -> list[int]:
        return [stage.context_length or self.context_length for stage in self.stages.values()]

    @cached_property
    def orders(self) -> dict[str, SourceOrder]:
        """The order of each source, from the first batch on what it is."""
        return {
            name: SourceOrder(
                name,
                stream.chunk_tokens,
                self.shortest_context,
                self.longest_context,
                self.chunk_window,
                self.seed,
            )
            for name, stream in self._streams.items()
        }

    def _check_source(self, name: str, card: Card) -> None:
        if card.tokenizer["digest"] != self.tokenizer.digest:
            raise UserError(
                f"source '{name}' was prepared with another tokenizer "
                f"({card.tokenizer['digest'][:12]}…) than {self.tokenizer_path} "
                f"({self.tokenizer.digest[:12]}…); prepare it again or set data.tokenizer"
            )

    def _check_cache(self) -> None:
        remote = [s for s in self._streams.values() if is_url(s.path)]
        needed = sum(sum(sorted(c.bytes for c in s.chunks)[-self.chunk_window :]) for s in remote)
        if needed > self.cache.max_bytes:
            raise UserError(
                f"data.cache_gigabytes is {self.cache.max_bytes / 1e9:.3f}, but one window of "
                f"{self.chunk_window} chunks of each remote source takes {needed / 1e9:.3f}; raise "
                "it or lower data.chunk_window"
            )

    @property
    def digests(self) -> dict[str, str]:
        return {name: stream.card.digest for name, stream in self._streams.items()}

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names that ``TokenBatch.sources`` counts."""
        return tuple(sorted(self._streams))

    # -- training --------------------------------------------------------------------------------

    def build_curriculum(self, history: tuple[Segment, ...] = ()) -> Curriculum:
        """The whole run: what was consumed, and what the stages say of the rest."""
        segments = plan(
            self.stages, self.digests, self.context_length, self.global_batch_tokens, history
        )
        curriculum = Curriculum(segments, self.orders, self.digests)
        check_history(history, curriculum)
        return curriculum

    def build_loader(self, curriculum: Curriculum) -> PositionLoader:
        return PositionLoader(
            curriculum,
            self._streams,
            self.tokenizer.eos_id,
            self.layout(),
            self.num_workers,
            document_masking=self.document_masking,
        )

    def ledger(self) -> dict[str, float]:
        """Tokens and epochs of each source so far, as metrics."""
        curriculum, position = self.loader.curriculum, self.loader.position
        tokens, epochs = curriculum.tokens(position), curriculum.epochs(position)
        return {f"data/tokens/{name}": float(n) for name, n in tokens.items()} | {
            f"data/epochs/{name}": n for name, n in epochs.items()
        }

    def announce(self, curriculum: Curriculum) -> None:
        """Say before the run what it will read, and what it will repeat."""
        steps = self.trainer.max_steps if self.trainer else -1
        if steps < 0:
            return
        end = curriculum.position_of_step(steps)
        tokens, epochs = curriculum.tokens(end), curriculum.epochs(end)
        total = sum(tokens.values())
        rank_zero_info(f"data: {total:,} tokens in {steps:,} steps")
        for name in sorted(tokens, key=tokens.get, reverse=True):
            if not tokens[name]:
                continue
            read = f"{epochs[name]:.2f} epochs" if name in epochs else "gone"
            rank_zero_info(
                f"  {name:<24} {tokens[name]:>16,} tokens {tokens[name] / total:6.1%}  {read}"
            )
            if epochs.get(name, 0) > EPOCHS_TO_WARN:
                rank_zero_warn(
                    f"source '{name}' will be read {epochs[name]:.1f} times; more than "
                    f"{EPOCHS_TO_WARN} repetitions are reported to stop helping",
                    category=UserWarning,
                )

    # -- evaluation ------------------------------------------------------------------------------

    def val_dataloader(self) -> HeldOut:
        """The first ``held_out_tokens`` of each source's held-out text."""
        return self._held_out(self.held_out_tokens)

    def test_dataloader(self) -> HeldOut:
        """All held-out text."""
        return self._held_out(None)

    predict_dataloader = val_dataloader

    def _held_out(self, limit: int | None) -> HeldOut:
        streams = {}
        for i, name in enumerate(self.source_names):
            train = self._streams[name]
            longest = max((chunk.tokens for chunk in train.card.chunks["held_out"]), default=0)
            if longest > self.context_length:
                streams[i] = TokenStream(train.path, "held_out", self.cache, self.verify)
            else:
                rank_zero_warn(
                    f"source '{name}' is not evaluated: its longest held-out chunk has {longest} "
                    f"tokens, a sequence {self.context_length}; prepare it with --held_out 0.1",
                    category=UserWarning,
                )
        return HeldOut(streams, self.tokenizer.eos_id, self.context_length, self.layout(), limit)

    def order_settings(self) -> dict[str, int]:
        return {
            "data.seed": self.seed,
            "data.shortest_context": self.shortest_context,
            "data.longest_context": self.longest_context,
            "data.chunk_window": self.chunk_window,
        }
