"""Where a run starts from: its own newest checkpoint, or another run's."""

from dataclasses import dataclass
from pathlib import Path

from smol.checkpoints.store import CheckpointInfo, FsspecStore
from smol.errors import UserError, nearest
from smol.model.io import WEIGHTS
from smol.paths import project_root, resolve

CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Start:
    """What a command starts from.

    Attributes:
        checkpoint: Whole state to go on from: weights, optimiser, position.
        weights: Weights only.
        lineage: Set where the run takes another path than the one of its newest checkpoint, so that
            what it saves from now on counts as newer, whatever its step.
        reason: In words, for the log.
    """

    checkpoint: Path | None = None
    weights: Path | None = None
    lineage: int | None = None
    reason: str = "starts from scratch"


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint of a run that passes verification; ``None`` if it has none."""
    store = FsspecStore(run_folder / CHECKPOINTS)
    info = store.latest_verified()
    return None if info is None else store.load_path(info)


def find_start(
    run_folder: Path,
    ckpt_path: str | Path | None = None,
    continues: str | None = None,
    init_from: str | None = None,
    training: bool = True,
) -> Start:
    """Decide what a command starts from.

    A run that has checkpoints of its own goes on from them, whatever it began with; so the same
    line restarts it.

    Args:
        run_folder: Folder of the run.
        ckpt_path: A checkpoint's folder that was asked for, or ``"scratch"`` to start anew.
        continues: Name of the run whose whole state begins this one.
        init_from: Name of the run (or folder) whose weights begin this one.
        training: Whether the command trains; if not, there must be something to start from.

    Raises:
        UserError: what is named is not there.
    """
    store = FsspecStore(run_folder / CHECKPOINTS)
    own = store.list()
    if ckpt_path == "scratch":
        return Start(lineage=_new_lineage(own, None))
    if ckpt_path is not None:
        folder = Path(resolve(ckpt_path))
        if not folder.exists():
            raise UserError(f"--ckpt_path {ckpt_path} is not there; expected a checkpoint's folder")
        lineage = _new_lineage(own, folder)
        return Start(checkpoint=folder, lineage=lineage, reason=f"goes on from {folder}")
    newest = store.latest_verified(own)
    if newest is not None:
        folder = store.load_path(newest)
        reason = f"goes on from its own checkpoint {folder}"
        return Start(checkpoint=folder, lineage=_new_lineage(own, folder), reason=reason)
    if damaged := store.marked():
        raise UserError(
            f"all {len(damaged)} checkpoints in {run_folder / CHECKPOINTS} are damaged; restore "
            "one, or begin anew with --ckpt_path scratch"
        )
    if continues is not None:
        found = _predecessor(run_folder.parent, continues)
        return Start(checkpoint=found, reason=f"continues {continues} from {found}")
    if init_from is not None:
        folder = Path(resolve(init_from))
        found = (
            folder if (folder / WEIGHTS).exists() else _predecessor(run_folder.parent, init_from)
        )
        return Start(weights=found, reason=f"takes its weights from {found}")
    if not training:
        raise UserError(
            f"the run '{run_folder.name}' has no checkpoint in {run_folder / CHECKPOINTS}; "
            f"train it first: {_command(run_folder.name)}"
        )
    return Start()


def _new_lineage(checkpoints: list[CheckpointInfo], start: Path | None) -> int | None:
    """The lineage of a run that does not go on from its newest checkpoint; ``None`` if it does."""
    if not checkpoints or (start is not None and start.name == checkpoints[-1].key):
        return None
    return checkpoints[-1].manifest.lineage + 1


def _predecessor(runs_dir: Path, name: str) -> Path:
    found = newest_checkpoint(runs_dir / name)
    if found is None and "/" in name:
        raise UserError(
            f"{name} has neither {WEIGHTS} nor a run's checkpoints; expected the name of a run in "
            f"{runs_dir}, or the folder of a decoder for init_from"
        )
    if found is None:
        runs = [folder.name for folder in runs_dir.glob("*") if (folder / CHECKPOINTS).is_dir()]
        raise UserError(
            f"the run '{name}' has no checkpoint in {runs_dir / name}; make it first: "
            f"{_command(name)}.{nearest(name, runs)}"
        )
    return found


def _command(name: str) -> str:
    """The command that makes a run: that of the configuration with its name, if there is one."""
    for config in sorted(project_root().glob("configs/**/*.yaml")):
        if f"\nname: {name}\n" in "\n" + config.read_text(encoding="utf-8"):
            return f"python src/train.py fit --config {config.relative_to(project_root())}"
    return f"python src/train.py fit --config FILE --name {name}"


def decoder_folder(path: str | Path) -> Path:
    """The decoder folder that a path stands for: itself, or the newest checkpoint of a run.

    Args:
        path: A run's folder, a checkpoint, or a decoder folder.

    Raises:
        UserError: it is none of them.
    """
    folder = Path(path)
    if (folder / WEIGHTS).is_file():
        return folder
    found = newest_checkpoint(folder)
    if found is None:
        raise UserError(
            f"{path} is neither a decoder folder nor a run with a checkpoint; a run is made by "
            "src/train.py fit, a Hugging Face folder imported by src/convert.py import"
        )
    return found


def tokenizer_of(run_folder: str | Path) -> Path | None:
    """The tokenizer of a run or of one of its checkpoints; ``None`` where no configuration is."""
    import yaml

    # A checkpoint lies two folders below its run's.
    folders = (Path(run_folder), *Path(run_folder).resolve().parents[1:2])
    config = next((f / "config.yaml" for f in folders if (f / "config.yaml").is_file()), None)
    if config is None:
        return None
    data = yaml.safe_load(config.read_text(encoding="utf-8")).get("data") or {}
    tokenizer = data.get("init_args", {}).get("tokenizer")
    return None if tokenizer is None else Path(resolve(tokenizer))
