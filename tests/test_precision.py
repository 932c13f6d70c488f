"""``trainer.precision: auto``."""

from pathlib import Path

import pytest
import torch

from smol import precision
from smol.cli import main


@pytest.fixture(autouse=True)
def _another_machine():
    precision.multiplies_bfloat16.cache_clear()
    yield
    precision.multiplies_bfloat16.cache_clear()


@pytest.mark.parametrize(
    ("amx", "avx512", "vendor", "expected"),
    [
        (True, True, "GenuineIntel", "bf16-mixed"),
        (False, True, "GenuineIntel", "32-true"),
        (False, True, "AuthenticAMD", "bf16-mixed"),
        (False, False, "AuthenticAMD", "32-true"),
        (False, False, "", "32-true"),
    ],
)
def test_processors(monkeypatch, tmp_path: Path, amx, avx512, vendor, expected) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nvendor_id : {vendor}\n")
    assert precision.fastest_precision("cpu") == precision.fastest_precision("auto") == expected
    assert precision.fastest_precision("mps") == "32-true"
    assert precision.fastest_precision({"class_path": "An.Accelerator"}) == "32-true"


@pytest.mark.parametrize("supported", [True, False])
def test_gpus(monkeypatch, supported: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    expected = "bf16-mixed" if supported else "32-true"
    assert precision.fastest_precision("gpu") == precision.fastest_precision("auto") == expected


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], None), (["--trainer.precision", "64-true"], "64-true")],
    ids=["auto", "set"],
)
def test_what_runs_is_a_precision(capsys: pytest.CaptureFixture, flags, expected) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "configs/stage1.yaml", "--print_config", *flags])
    printed = capsys.readouterr().out
    assert f"  precision: {expected or precision.fastest_precision('cpu')}\n" in printed
