"""What threads of gloo still hold when a run ends does not abort its process."""

import subprocess
import sys

# A collective whose other process answers while the interpreter is taken down, where its result is
# handed to Python; as under load, when a thread of gloo has not yet let go of the last one.
SCRIPT = """
import os, tempfile, time
import torch, torch.distributed as dist
from smol.parallel.processes import leave_groups_at_exit

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(1.5)

path = tempfile.mktemp()
rank = 0 if os.fork() else 1
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
if rank == 1:
    time.sleep(0.7)
    dist.all_reduce(torch.ones(9))
    os._exit(0)
keep = Slow()
dist.all_reduce(torch.ones(9), async_op=True).get_future().then(lambda done: None)
leave_groups_at_exit()
"""


def test_a_process_ends_after_its_threads():
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
