"""Sessions with remote stores that survive a fork in silence."""

from typing import Any

_sessions: list[Any] = []  # one for each address and its settings


def filesystem(
    url: str, options: dict[str, Any] | None = None, renew: bool = False
) -> tuple[Any, str]:
    """The fsspec file system behind a URL, and the path within.

    fsspec keeps one session per process and settings, and a forked worker begins its own. Where
    nothing but fsspec holds the parent's, the worker would try to close that one with its own event
    loop, which ends in a traceback on the terminal; so each is held here.

    Args:
        url: A path or any fsspec URL.
        options: Passed to fsspec (endpoint, credentials, …).
        renew: Begin a new session, which ends with its file system.

    Returns:
        ``(file system, path)``.
    """
    import fsspec

    fs, path = fsspec.url_to_fs(url, skip_instance_cache=renew, **(options or {}))
    if not renew and not any(fs is session for session in _sessions):
        _sessions.append(fs)
    return fs, path
