"""Whether the state of a run is finite, by the device where it lies."""

import torch

from smol.modules.snapshot import _finite_by_device


def test_each_device_judges_what_it_holds():
    """Offloaded parameters are on the host, buffers on the device; here ``meta`` stands for it."""
    cpu, meta = torch.device("cpu"), torch.device("meta")
    elsewhere = [torch.ones(2, device=meta), torch.ones(3, device=meta)]
    for value, finite in ((2.0, True), (float("inf"), False), (float("nan"), False)):
        here = [
            torch.tensor([1.0, value]),
            torch.tensor([7]),
            torch.ones(0),
            torch.ones(2).bfloat16(),
        ]
        found = _finite_by_device([elsewhere[0], *here, elsewhere[1]])
        assert {device: flag.device for device, flag in found.items()} == {cpu: cpu, meta: meta}
        assert bool(found[cpu]) is finite
