"""What LightningDataModules share whose position is a number."""

from abc import abstractmethod
from typing import Any

from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from smol.data.curriculum import Curriculum
from smol.data.loader import Layout, PositionLoader
from smol.data.stages import Segment, skip
from smol.errors import UserError


class PositionedData(LightningDataModule):
    """Data that are read by position: the loader, and what a checkpoint holds of them.

    Attributes:
        micro_batch_tokens: Tokens of one forward and backward pass of one process.
        allow_changed_data: Whether a run may go on though data that it has read have changed.
        loader: The loader of the training, once there is one.
    """

    micro_batch_tokens: int
    allow_changed_data = False
    loader: PositionLoader | None = None
    _history: tuple[Segment, ...] = ()

    @abstractmethod
    def build_curriculum(self, history: tuple[Segment, ...] = ()) -> Curriculum:
        """The whole run: what was consumed, and what comes next."""

    @abstractmethod
    def build_loader(self, curriculum: Curriculum) -> PositionLoader:
        """The loader over it."""

    @property
    @abstractmethod
    def digests(self) -> dict[str, str]:
        """Source name to the digest of its content."""

    @abstractmethod
    def order_settings(self) -> dict[str, int]:
        """What may not change in mid-run, by its key in the configuration."""

    def announce(self, curriculum: Curriculum) -> None:
        """Say before the run what it will read."""

    # -- training --------------------------------------------------------------------------------

    def train_dataloader(self) -> PositionLoader:
        """The endless loader, at the position that was restored."""
        curriculum = self.build_curriculum(self._history)
        self.loader = self.build_loader(curriculum)
        if self._history:
            self.loader.seek(self._history[-1].stop)
        self.announce(curriculum)
        return self.loader

    def consume(self, position: int) -> None:
        """Called by the module when an optimiser step has ended."""
        self.loader.consume(position)

    def skip(self, start: int, stop: int) -> None:
        """The optimiser steps on what was read from ``start`` to ``stop`` were dropped or undone.

        The data counts as consumed; stages that begin at a later step begin as much later in the
        data.
        """
        history = skip(self.loader.curriculum.history(self.loader.position), start, stop)
        self.loader.replan(self.build_curriculum(history))

    @property
    def accumulation(self) -> int:
        """Micro-batches of this process in the next optimiser step."""
        return self.loader.accumulation

    @property
    def trained_context(self) -> int | None:
        """Tokens per sequence of the last optimiser step that was taken."""
        history = self.loader.curriculum.history(self.loader.position) if self.loader else ()
        trained = [s.context for s in history if s.stop - s.start > s.skipped_tokens]
        return trained[-1] if trained else None

    def layout(self) -> Layout:
        """This process's share of a global batch."""
        sharing = (self.trainer and self.trainer.distributed_sampler_kwargs) or {}
        return Layout(
            sharing.get("rank", 0), sharing.get("num_replicas", 1), self.micro_batch_tokens
        )

    # -- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The position, and the curriculum as consumed. JSON-compatible."""
        if self.loader is None:
            return {}
        history = self.loader.curriculum.history(self.loader.position)
        return {
            "position": self.loader.position,
            "order": self.order_settings(),
            "segments": [segment.to_json() for segment in history],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; what only evaluates it may read anything.

        Raises:
            UserError: the order's settings or the content of a source that was read have changed.
        """
        training = self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        if not (state_dict and training):
            return
        for key, value in self.order_settings().items():
            if state_dict["order"][key] != value:
                raise UserError(
                    f"the checkpoint was made with {key}={state_dict['order'][key]}, the "
                    f"configuration says {value}; it is fixed when a run begins: restore it, or "
                    "begin a new run from the weights with init_from"
                )
        self._history = tuple(Segment.from_json(s) for s in state_dict["segments"])
        digests = self.digests
        for segment in self._history:
            for name, digest in segment.digests.items():
                if digests.get(name, digest) != digest and not self.allow_changed_data:
                    raise UserError(
                        f"source '{name}' has changed since stage '{segment.stage}' read it "
                        f"(digest {digest[:12]}…, now {digests[name][:12]}…); restore it, or pass "
                        "--data.allow_changed_data true"
                    )
