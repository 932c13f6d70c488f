"""What a path on the command line stands for: which weights, which tokenizer, under which name."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from smol.checkpoints.store import MARKER_FILE, is_key
from smol.errors import UserError
from smol.paths import find


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk.

    Attributes:
        weights: A decoder folder, a checkpoint or a Hugging Face folder.
        tokenizer: Folder of the tokenizer.
        template: Folder of the chat template, if there is one.
        name: For tables: ``RUN@STEP`` of a checkpoint, else the folder's name.
        results: The folder that is about this model: that of the run, or ``weights``.
        is_huggingface: Whether ``weights`` is a Hugging Face folder.
    """

    weights: Path
    tokenizer: Path
    template: Path
    name: str
    results: Path
    is_huggingface: bool

    @property
    def fingerprint(self) -> str:
        """Changes when the weights, their description, the tokenizer or the template do.

        Of a checkpoint what commits it counts, of other weights the times and sizes of the files.
        """
        marker = self.weights / MARKER_FILE
        files = [marker, *(self.weights / name for name in ("config.json", "decoder.json"))]
        files += [self.tokenizer / name for name in ("tokenizer.json", "tokenizer_config.json")]
        files += [self.template / name for name in ("tokenizer_config.json", "chat_template.jinja")]
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.name} {file.is_file()}".encode())
            digest.update(file.read_bytes() if file.is_file() else b"")
        if not marker.is_file():
            for file in sorted(self.weights.glob("*.safetensors")):
                stat = file.stat()
                digest.update(repr((file.name, stat.st_size, stat.st_mtime_ns)).encode())
        return digest.hexdigest()


def find_model(path: str | Path, tokenizer: str | Path | None = None) -> ModelFolder:
    """Find what a path stands for.

    Args:
        path: A run's folder, whose newest verified checkpoint counts; a checkpoint; a decoder
            folder; or a Hugging Face folder.
        tokenizer: Folder of the tokenizer, where it is not the one that goes with the model.

    Raises:
        UserError: If there is no such model, or no tokenizer is known.
    """
    from smol.runs import decoder_folder, tokenizer_of

    folder = Path(find(path)).absolute()
    if not folder.is_dir():
        raise UserError(f"{path} is not there; expected a run's folder or a Hugging Face folder")
    is_huggingface = (folder / "config.json").is_file()
    weights = folder if is_huggingface else decoder_folder(folder)
    if is_key(weights.name):
        results = weights.parents[1]
        name = f"{results.name}@{int(weights.name.split('-')[1])}"
    else:
        results, name = weights, folder.name
    if tokenizer is None and not (folder / "tokenizer.json").is_file():
        tokenizer = tokenizer_of(folder)
        if tokenizer is None:
            raise UserError(f"{path} names no tokenizer; say which with --tokenizer FOLDER")
    tokenizer = Path(find(tokenizer or folder))
    of_run = (
        results / "tokenizer"
    )  # which a run on chats has, for it may have a template of its own
    template = of_run if of_run.is_dir() else tokenizer
    return ModelFolder(weights, tokenizer, template, name, results, is_huggingface)
