"""Where a run starts from: its own newest checkpoint, or another run's."""

from dataclasses import dataclass, replace
from pathlib import Path

from smol.checkpoints.replicas import RemoteRuns, Replicas
from smol.checkpoints.store import CheckpointInfo, FsspecStore, is_key
from smol.errors import UserError, nearest
from smol.model.io import WEIGHTS, has_weights
from smol.paths import is_url, project_root, resolve

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


def replicas(run_folder: Path, remote: RemoteRuns | None = None) -> Replicas:
    """The checkpoints of a run, in its folder and in the store of all runs, if there is one."""
    folder = run_folder / CHECKPOINTS
    there = None if remote is None else remote.of(run_folder.absolute().name, folder)
    return Replicas(FsspecStore(folder), there)


def newest_checkpoint(run_folder: Path, remote: RemoteRuns | None = None) -> Path | None:
    """The newest checkpoint of a run that passes verification; ``None`` if it has none."""
    found = replicas(run_folder, remote).newest()
    return None if found is None else found[1]


def find_start(
    run_folder: Path,
    ckpt_path: str | Path | None = None,
    continues: str | None = None,
    init_from: str | None = None,
    training: bool = True,
    remote: RemoteRuns | None = None,
) -> Start:
    """Decide what a command starts from.

    A run that has checkpoints of its own, in its folder or in the store, goes on from them,
    whatever it began with; so the same line restarts it.

    Args:
        run_folder: Folder of the run.
        ckpt_path: A checkpoint that was asked for, by its folder or URL; the URL of a run's store
            for its newest; ``"latest"`` for the newest of this run, which must be there;
            ``"scratch"`` to start anew, from the weights of ``init_from`` if any; ``"auto"`` or
            None for the newest, if there is one.
        continues: Name of the run whose whole state begins this one.
        init_from: Name of the run (or folder) whose weights begin this one.
        training: Whether the command trains; if not, there must be something to start from.
        remote: Where the checkpoints of all runs are safe.

    Raises:
        UserError: what is named is not there.
    """
    store = replicas(run_folder, remote)
    own = store.list()
    if ckpt_path == "scratch":
        lineage = _new_lineage(own, None)
        if init_from is None:
            return Start(lineage=lineage)
        return replace(_weights_of(init_from, run_folder, remote), lineage=lineage)
    if ckpt_path not in (None, "auto", "latest"):
        folder = _named(str(ckpt_path), run_folder, remote)
        lineage = _new_lineage(own, folder)
        return Start(checkpoint=folder, lineage=lineage, reason=f"goes on from {ckpt_path}")
    newest = store.newest(own)
    if newest is not None:
        info, folder = newest
        lineage = _new_lineage(own, folder)
        if not store.complete:  # what is in the store may be newer
            lineage = info.manifest.lineage + 1
        reason = f"goes on from its own checkpoint {folder}"
        return Start(checkpoint=folder, lineage=lineage, reason=reason)
    if damaged := store.marked():
        raise UserError(
            f"all {len(damaged)} checkpoints in {run_folder / CHECKPOINTS} are damaged; restore "
            "one, or begin anew with --ckpt_path scratch"
        )
    if ckpt_path == "latest":
        raise UserError(
            f"the run '{run_folder.name}' has no checkpoint in {run_folder / CHECKPOINTS}; to "
            "begin without one type --ckpt_path auto"
        )
    if continues is not None:
        found = _predecessor(run_folder.parent, continues, remote)
        return Start(checkpoint=found, reason=f"continues {continues} from {found}")
    if init_from is not None:
        return _weights_of(init_from, run_folder, remote)
    if not training:
        raise UserError(
            f"the run '{run_folder.name}' has no checkpoint in {run_folder / CHECKPOINTS}; "
            f"train it first: {_command(run_folder.name)}"
        )
    return Start()


def _weights_of(init_from: str, run_folder: Path, remote: RemoteRuns | None) -> Start:
    folder = Path(resolve(init_from))
    found = folder if has_weights(folder) else _predecessor(run_folder.parent, init_from, remote)
    return Start(weights=found, reason=f"takes its weights from {found}")


def _new_lineage(checkpoints: list[CheckpointInfo], start: Path | None) -> int | None:
    """The lineage of a run that does not go on from its newest checkpoint; ``None`` if it does."""
    if not checkpoints or (start is not None and start.name == checkpoints[-1].key):
        return None
    return checkpoints[-1].manifest.lineage + 1


def _named(ckpt_path: str, run_folder: Path, remote: RemoteRuns | None) -> Path:
    """The local folder of a checkpoint that was named by a folder or a URL."""
    if not is_url(ckpt_path):
        folder = Path(resolve(ckpt_path))
        if not folder.exists():
            raise UserError(f"--ckpt_path {ckpt_path} is not there; expected a checkpoint's folder")
        return folder
    url, _, name = ckpt_path.rstrip("/").rpartition("/")
    options = remote.storage_options if remote is not None else None
    root, key = (url, name) if is_key(name) else (f"{url}/{name}", None)
    downloads = run_folder / "downloads"
    store = Replicas(FsspecStore(downloads), FsspecStore(root, downloads, options))
    infos = [i for i in store.list() if i.key == key or (key is None and store.is_remote(i))]
    found = store.newest(infos)
    if found is None:
        raise UserError(
            f"--ckpt_path {ckpt_path} is not there, or damaged; expected the URL of a checkpoint, "
            "or of a folder with checkpoints"
        )
    return found[1]


def _predecessor(runs_dir: Path, name: str, remote: RemoteRuns | None) -> Path:
    found = newest_checkpoint(runs_dir / name, None if "/" in name else remote)
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
    if has_weights(folder):
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
    own = next((f / "tokenizer" for f in folders if (f / "tokenizer").is_dir()), None)
    if own is not None:  # that of a run on chats, with its template
        return own
    config = next((f / "config.yaml" for f in folders if (f / "config.yaml").is_file()), None)
    if config is None:
        return None
    data = yaml.safe_load(config.read_text(encoding="utf-8")).get("data") or {}
    tokenizer = data.get("init_args", {}).get("tokenizer")
    return None if tokenizer is None else Path(resolve(tokenizer))
