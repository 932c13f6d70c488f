"""Reading documents of a Hugging Face dataset, streamed from the hub or saved on disk."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from smol.data.documents import Piece, Shard, even_ranges, field, no_field
from smol.errors import UserError


@dataclass(frozen=True)
class HubDataset:
    """Documents of a dataset on the Hugging Face hub, or of a folder that ``datasets`` reads.

    Args:
        path: A hub name (``HuggingFaceFW/fineweb-edu``), a folder of data files, or a folder
            written by ``Dataset.save_to_disk``.
        config: The configuration's name, for example ``sample-10BT``.
        split: The split to read.
        field: The column that holds the text.
        revision: A commit or tag of the dataset; recorded in the card.
        shard_bytes: Bytes per shard of a dataset saved to disk. A streamed dataset is cut where
            its files are.
    """

    path: str
    config: str | None = None
    split: str = "train"
    field: str = "text"
    revision: str | None = None
    shard_bytes: int = 64 * 2**20

    def settings(self) -> dict[str, Any]:
        """Return what shapes the documents, without the place where they lie."""
        return {key: value for key, value in asdict(self).items() if key != "path"}

    def inputs(self) -> dict[str, Any]:
        """Return the dataset's name; its content is pinned by ``revision``."""
        return {"hub": PurePosixPath(self.path).name}

    def shards(self) -> list[Shard]:
        """Cut a saved dataset by rows, a streamed one by its files."""
        dataset = self.load()
        reader = partial(_read_hub, self)
        columns = dataset.column_names
        if columns is not None and self.field not in columns:
            raise UserError(no_field(f"dataset {self.path}", self.field, columns))
        if hasattr(dataset, "num_shards"):
            count = dataset.num_shards
            return [Shard((Piece(self.path, 0, i, count),), reader) for i in range(count)]
        rows, size = len(dataset), dataset.data.nbytes
        ranges = even_ranges(rows, size / self.shard_bytes)
        pieces = (Piece(self.path, size * (b - a) // max(1, rows), a, b) for a, b in ranges)
        return [Shard((piece,), reader) for piece in pieces]

    def load(self) -> Any:
        """Return the ``datasets`` object, streaming unless it was saved to disk.

        Raises:
            UserError: ``datasets`` is missing, or it cannot find or reach the dataset.
        """
        try:
            import datasets
        except ImportError:
            raise UserError(
                "reading a hub dataset needs the package datasets: pip install datasets"
            ) from None
        try:
            if (Path(self.path) / "dataset_info.json").exists():
                return datasets.load_from_disk(self.path)
            return datasets.load_dataset(
                self.path, self.config, split=self.split, revision=self.revision, streaming=True
            )
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"dataset {self.path}: cannot be loaded ({reason})") from None


def _read_hub(source: HubDataset, piece: Piece) -> Iterator[str]:
    dataset = source.load()
    if hasattr(dataset, "num_shards"):
        dataset = dataset.shard(num_shards=piece.stop, index=piece.start)
    else:
        dataset = dataset.select(range(piece.start, piece.stop))
    for row, record in enumerate(dataset):
        where = partial("dataset {}, row {}".format, source.path, piece.start + row)
        yield from field(record, source.field, where)
