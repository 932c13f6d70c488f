"""Peaks by device name."""

import pytest

from smol.model.peak_flops import PEAK_FLOPS, peak_flops


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("A100-SXM4-40GB", 312e12),  # as older drivers say it
        ("AMD Instinct MI300X", 1307.4e12),
    ],
)
def test_known_devices(name, expected):
    assert peak_flops(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",  # a seventh of one
        "NVIDIA H1000",
        "NVIDIA H100",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "Tesla V100-SXM2-16GB",  # has no bfloat16
        "",
    ],
)
def test_an_unknown_device_has_no_peak(name):
    assert peak_flops(name) is None


def test_peaks_are_dense():
    """The fastest part sold by name does 2.5e15; a figure with sparsity would be beyond."""
    assert all(1e12 < peak <= 2.5e15 for peak in PEAK_FLOPS.values())
