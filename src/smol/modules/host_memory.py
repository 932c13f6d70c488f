"""How a training on a processor asks the operating system for memory."""

import ctypes
import os

# From malloc.h of glibc. 32 MiB is the greatest threshold it takes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD, _NEVER = 32 * 2**20, 2**31 - 1


def keep_freed_memory() -> bool:
    """Have glibc keep what tensors leave behind, for the tensors of the next step.

    Left alone it hands large blocks back, and takes them anew a moment later: each page of each
    activation is then cleared by the kernel in every step (see docs/log.md). It holds for the
    process, and until its end. Blocks of more than 32 MiB go back all the same.

    Returns:
        Whether it was done: not without glibc, nor against ``MALLOC_...`` in the environment.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    settings = (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, _NEVER)
    return all(mallopt(*setting) for setting in settings)
