"""The end of a run of several processes."""

import atexit
import gc

import torch.distributed as dist


def leave_groups_at_exit() -> None:
    """End the process groups before the interpreter, when this process ends.

    A thread of gloo lets go of a collective a moment after its result is there, and needs the
    interpreter for that where tensors are known to it. While the interpreter is taken down the
    attempt ends the process by SIGABRT ("terminate called without an active exception"), which a
    launcher takes for a crash. Call it where all processes have ended in order: it waits for what
    is under way.
    """
    if dist.is_available() and dist.is_initialized():
        atexit.register(_leave_groups)


def _leave_groups() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # the threads of a group end with the last object that knows it
