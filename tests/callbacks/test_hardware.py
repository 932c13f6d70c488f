"""The machine's figures, and faults of card, disk and speed in the middle of a run."""

import json
import threading
import time
from types import SimpleNamespace

import psutil
import pytest
from lightning import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from tiny import make_trainer

from callbacks import Events, HardwareMonitor, Throughput
from callbacks.hardware import ThroughputBand
from smol.errors import UserError
from smol.experiments import CSVLogger

GB = 10**9


class FakeNVML:
    """Answers as pynvml does for one card."""

    class NVMLError(Exception):
        pass

    def __init__(self):
        self.reasons, self.lost, self.reads = 4, False, 0  # at its power cap, which is no fault

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByIndex(self, index):
        return "card"

    def nvmlDeviceGetUtilizationRates(self, handle):
        self.reads += 1
        if self.lost:
            raise self.NVMLError("GPU is lost")
        return SimpleNamespace(gpu=97, memory=40)

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=60 * GB, free=20 * GB, total=80 * GB)

    def nvmlDeviceGetTemperature(self, handle, sensor):
        assert sensor == 0  # NVML_TEMPERATURE_GPU
        return 71

    def nvmlDeviceGetPowerUsage(self, handle):
        return 650_000

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self.reasons


class At(Callback):
    """Calls something at a step."""

    def __init__(self, **calls):
        self.calls = {int(step.removeprefix("step")): call for step, call in calls.items()}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        time.sleep(0.02)  # several samples
        self.calls.get(trainer.global_step, lambda: None)()


def fit(folder, steps, *callbacks, **kwargs):
    """Train a model that knows nothing of tokens; returns the faults recorded."""
    options = {"plugins": [], "logger": CSVLogger(str(folder))} | kwargs
    trainer = make_trainer(folder, steps, callbacks=[Events(), *callbacks], **options)
    trainer.fit(BoringModel())
    events = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [event for event in events if event["kind"] not in ("start", "end")]


def test_figures_of_the_machine(tmp_path):
    monitor = HardwareMonitor(seconds=0.005, nvml=FakeNVML())
    assert fit(tmp_path, 6, At(), monitor) == []
    row = {k: float(v) for k, v in CSVLogger(str(tmp_path)).rows()[-1].items()}
    assert row["hardware/gpu_percent"] == 97
    assert row["hardware/gpu_memory_gigabytes"] == 60
    assert row["hardware/gpu_celsius"] == 71
    assert row["hardware/gpu_watts"] == 650
    assert row["hardware/gpu_throttle"] == 4
    assert 0 <= row["hardware/cpu_percent"] <= 100
    assert 0 < row["hardware/ram_percent"] < 100
    free = psutil.disk_usage(str(tmp_path)).free / GB
    assert row["hardware/disk_free_gigabytes"] == pytest.approx(free, abs=1)


def test_no_gpu_no_figures_of_one(tmp_path):
    fit(tmp_path, 4, At(), HardwareMonitor(seconds=0.005))
    names = CSVLogger(str(tmp_path)).rows()[-1]
    assert "hardware/cpu_percent" in names
    assert not [name for name in names if "gpu" in name]


@pytest.mark.parametrize(
    ("bit", "reason"), [(8, "hardware slowdown"), (32, "hot"), (64, "hot"), (128, "power brake")]
)
def test_a_throttled_card_is_an_event_and_its_end_too(tmp_path, bit, reason):
    nvml = FakeNVML()

    def brake():
        nvml.reasons |= bit

    def release():
        nvml.reasons = 4

    begins, ends = fit(
        tmp_path, 14, At(step4=brake, step8=release), HardwareMonitor(seconds=0.005, nvml=nvml)
    )
    assert (begins["kind"], begins["fields"]["active"]) == ("throttled", True)
    assert (ends["kind"], ends["fields"]["active"]) == ("throttled", False)
    assert f"process 0: {reason}" in begins["message"]
    assert 5 <= begins["step"] < ends["step"] <= 14


def test_a_short_throttling_between_two_logs_is_not_missed(tmp_path):
    nvml = FakeNVML()
    calls = At(
        step3=lambda: setattr(nvml, "reasons", 64), step6=lambda: setattr(nvml, "reasons", 1)
    )
    monitor = HardwareMonitor(seconds=0.005, nvml=nvml)
    begins, _ = fit(tmp_path, 20, calls, monitor, log_every_n_steps=10)
    assert begins["step"] == 10


def test_a_lost_card_is_an_event_and_the_run_goes_on(tmp_path):
    nvml = FakeNVML()
    calls = At(step4=lambda: setattr(nvml, "lost", True))
    (event,) = fit(tmp_path, 10, calls, HardwareMonitor(seconds=0.005, nvml=nvml))
    assert "does not answer" in event["message"]


def test_a_disk_that_fills_up_is_an_event(tmp_path, monkeypatch):
    free = [50 * GB]
    monkeypatch.setattr(psutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    calls = At(step4=lambda: free.__setitem__(0, GB), step8=lambda: free.__setitem__(0, 9 * GB))
    begins, ends = fit(tmp_path, 14, calls, HardwareMonitor(seconds=0.005))
    assert begins["kind"] == ends["kind"] == "disk_nearly_full"
    assert "1.00 GB free, expected at least 2" in begins["message"]
    assert not ends["fields"]["active"]


class Slow(Callback):
    """Makes every step from one on take long."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        time.sleep(0.2 if trainer.global_step >= self.step else 0.02)


@pytest.mark.parametrize("band", [None, (8.0, 1e9)])
def test_a_slow_machine_is_an_event(tmp_path, band):
    monitor = HardwareMonitor(patience=0.5, band=band)
    (event,) = fit(tmp_path, 26, Throughput(), monitor, Slow(20))
    assert event["kind"] == "throughput_out_of_band"
    assert 0 < event["fields"]["rate"] < 6
    assert event["step"] >= 23  # only after half a second of it


def noisy_rates(rng, number):
    """Rates of a shared machine: a tenth of noise, and one in fifty of a quarter the speed."""
    return [
        1000 * rng.lognormvariate(0, 0.1) * (0.25 if rng.random() < 0.02 else 1.0)
        for _ in range(number)
    ]


def test_the_band_bears_noise_and_new_shapes_but_no_slowness():
    import random

    band, now = ThroughputBand(None, patience=60.0), 0.0
    for shape, speed in [((8, 32), 1.0), ((4, 64), 0.3)]:  # a longer context is slower
        for rate in noisy_rates(random.Random(0), 5000):
            now += 10
            assert not band.update(speed * rate, shape, now)
    told = [band.update(0.4 * 300, (4, 64), now + 10 * k) for k in range(1, 9)]
    assert told == [False] * 6 + [True] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_the_thread_ends_with_the_training(tmp_path, fails):
    def fail():
        raise RuntimeError("lost")

    calls = At(step3=fail) if fails else At()
    before = set(threading.enumerate())
    nvml = FakeNVML()
    if fails:
        with pytest.raises(RuntimeError, match="lost"):
            fit(tmp_path, 5, calls, HardwareMonitor(seconds=0.005, nvml=nvml))
    else:
        fit(tmp_path, 5, calls, HardwareMonitor(seconds=0.005, nvml=nvml))
    assert not [t for t in set(threading.enumerate()) - before if "hardware" in t.name]
    reads = nvml.reads
    time.sleep(0.05)
    assert nvml.reads == reads > 0


def test_no_step_waits_for_a_slow_driver(tmp_path):
    class Sluggish(FakeNVML):
        def nvmlDeviceGetPowerUsage(self, handle):
            time.sleep(1.0)
            return 0

    begin = time.monotonic()
    seen = []
    calls = At(**{f"step{k}": lambda: seen.append(time.monotonic()) for k in range(10)})
    fit(tmp_path, 10, calls, HardwareMonitor(seconds=0.001, nvml=Sluggish()))
    assert seen[-1] - seen[0] < 0.9  # the end may wait for it, once
    assert time.monotonic() - begin < 5


def test_a_card_that_does_not_answer_at_all_is_no_fault(tmp_path):
    """A slice of a card has no utilisation of its own."""
    nvml = FakeNVML()
    nvml.lost = True
    assert fit(tmp_path, 4, At(), HardwareMonitor(seconds=0.005, nvml=nvml)) == []
    assert not [name for name in CSVLogger(str(tmp_path)).rows()[-1] if "gpu" in name]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [({"seconds": 0}, "seconds is 0"), ({"band": (5.0, 1.0)}, r"band is \[5.0, 1.0\], expected")],
)
def test_mistakes_are_one_line(mistake, message):
    with pytest.raises(UserError, match=message):
        HardwareMonitor(**mistake)
