"""By how many MB a process grows in merges: ``merge_memory.py '[[RECIPE, FILE_BYTES], ...]'``."""

import json
import sys
from pathlib import Path

from smol.merging import merge, parse_recipe


class PeakMemory:
    """By how many MB the process grows while it is entered: the kernel keeps the peak (Linux)."""

    def __enter__(self) -> "PeakMemory":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.before = self._peak()
        return self

    def __exit__(self, *error: object) -> None:
        self.growth = (self._peak() - self.before) / 1e3

    def _peak(self) -> int:
        """The largest resident size, in kB."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


growths = []
for number, (recipe, file_bytes) in enumerate(json.loads(sys.argv[1])):
    with PeakMemory() as memory:
        output = Path(f"merged{number}").absolute()
        merge(parse_recipe(recipe), output, file_bytes=file_bytes, log=lambda line: None)
    growths.append(memory.growth)
print(json.dumps(growths))
