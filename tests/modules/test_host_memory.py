"""Memory of the processor that is kept from step to step."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from smol.modules.host_memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("not done")
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    held = [torch.ones(n * 2**18) for n in range(4, 29, 4)]  # activations of 4 to 28 MiB
step(), step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""


def page_faults(way: str, **environment: str) -> int:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, way],
        env=clean | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="is about glibc")
def test_memory_is_taken_once():
    # Where blocks lie, chance decides; of those left alone the largest goes back at any rate.
    assert page_faults("keep") < 100 < 5_000 < page_faults("leave")


@pytest.mark.skipif(sys.platform != "linux", reason="is about glibc")
def test_who_sets_malloc_decides():
    with pytest.raises(AssertionError, match="not done"):
        page_faults("keep", MALLOC_TRIM_THRESHOLD_="131072")
