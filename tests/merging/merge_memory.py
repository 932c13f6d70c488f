"""By how many MB a process grows in merges: ``merge_memory.py '[[RECIPE, FILE_BYTES], ...]'``."""

import json
import sys
import threading
from pathlib import Path

import psutil

from smol.merging import merge, parse_recipe


class PeakMemory(threading.Thread):
    """By how many MB the process grows while it is entered."""

    def __enter__(self) -> "PeakMemory":
        self.process, self.ended = psutil.Process(), threading.Event()
        self.before = self.peak = self.process.memory_info().rss
        self.start()
        return self

    def run(self) -> None:
        while not self.ended.wait(0.001):
            self.peak = max(self.peak, self.process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.join()

    @property
    def growth(self) -> float:
        return (self.peak - self.before) / 1e6


growths = []
for number, (recipe, file_bytes) in enumerate(json.loads(sys.argv[1])):
    with PeakMemory() as memory:
        output = Path(f"merged{number}").absolute()
        merge(parse_recipe(recipe), output, file_bytes=file_bytes, log=lambda line: None)
    growths.append(memory.growth)
print(json.dumps(growths))
