"""Settings of every test: offline, one thread, the same seed."""

import os

# Before torch is imported: threads of two test processes would wait for each other's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is not a failed test. In CI the examples are the same each time.
settings.register_profile(
    "smol",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize="CI" in os.environ,
)
settings.load_profile("smol")


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # a training that failed leaves it on


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory):
    """Two small prepared sources, ``cats`` and ``dogs``, of several chunks, and their tokenizer."""
    from tiny import prepare_sources

    return prepare_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def source(sources):
    """One of them."""
    return sources / "cats"


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory):
    """A running S3 server with an empty bucket."""
    from object_store import ObjectStore

    store = ObjectStore(tmp_path_factory.mktemp("s3"))
    yield store
    store.stop()
