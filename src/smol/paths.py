"""Where relative paths of a configuration start: the project root, never the working directory."""

import os
import re
from glob import glob
from pathlib import Path

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")


def project_root() -> Path:
    """The folder that relative paths start from: ``SMOL_ROOT``, or the repository of this package.

    Returns:
        An absolute path.
    """
    root = os.environ.get("SMOL_ROOT")
    return Path(root).expanduser().resolve() if root else Path(__file__).resolve().parents[2]


def is_url(path: str | Path) -> bool:
    """Whether ``path`` names its protocol, as in ``s3://bucket/key``."""
    return bool(_URL.match(str(path)))


def resolve(path: str | Path) -> Path | str:
    """Make a relative path start at the project root.

    Args:
        path: A local path (``~`` is expanded) or a URL ``scheme://…``.

    Returns:
        An absolute `Path`, or the URL as it was given.
    """
    if is_url(path):
        return str(path)
    return project_root() / Path(path).expanduser()


def find(path: str | Path) -> str:
    """Where something that a command line names is: here, or else under the project root.

    Args:
        path: A local path or pattern, a URL, or another name.

    Returns:
        The path under the project root if it is relative and only there; else ``path`` as given.
    """
    text = str(path)
    if is_url(text) or Path(text).is_absolute() or glob(text):
        return text
    under_root = str(resolve(text))
    return under_root if glob(under_root) else text
