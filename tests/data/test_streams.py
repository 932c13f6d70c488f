"""Chunks on disk and in a real object store, whole and damaged."""

import asyncio
import gc
import logging
import shutil
import struct
from multiprocessing import get_context

import numpy as np
import pytest
from fsspec.asyn import get_loop, sync
from s3fs import S3FileSystem

from smol.data.card import read_card
from smol.data.streams import ChunkCache, TokenStream
from smol.errors import UserError


@pytest.fixture
def copy(source, tmp_path):
    return shutil.copytree(source, tmp_path / "cats")


def raw_tokens(folder, split, chunk):
    """The tokens of a chunk, by the layout on the page: three numbers, then the tokens."""
    data = (folder / split / chunk.file).read_bytes()
    assert struct.unpack("<III", data[:12]) == (1, 12, len(data))
    return np.frombuffer(data[12:], dtype="<u2")


def test_any_stretch_of_any_chunk(source):
    card = read_card(source)
    assert len(card.chunks["train"]) > 3
    for split in ("train", "held_out"):
        stream = TokenStream(source, split)
        for i, chunk in enumerate(card.chunks[split]):
            tokens = raw_tokens(source, split, chunk)
            assert len(tokens) == chunk.tokens == stream.chunk_tokens[i]
            assert (stream.read(i, 0, chunk.tokens) == tokens).all()
            assert (stream.read(i, 17, 30) == tokens[17:47]).all()


def test_litdata_reads_the_same_blocks(source):
    from litdata import StreamingDataset, TokensLoader

    dataset = StreamingDataset(str(source / "train"), item_loader=TokensLoader(block_size=100))
    stream = TokenStream(source)
    ours = [
        stream.read(chunk, start, 100)
        for chunk, tokens in enumerate(stream.chunk_tokens)
        for start in range(0, tokens - 99, 100)
    ]
    assert len(dataset) == len(ours)
    for i, block in enumerate(ours):
        assert (dataset[i].numpy() == block).all()


def damage(folder, kind):
    file = sorted((folder / "train").glob("*.bin"))[1]
    data = bytearray(file.read_bytes())
    if kind == "missing":
        file.unlink()
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "truncated":
        file.write_bytes(data[:-2])
    elif kind == "corrupt":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    return file.name


DAMAGES = {
    "missing": "is missing, but the card lists it",
    "empty": "has 0 bytes; the card says",
    "truncated": "bytes; the card says",
    "corrupt": "is corrupt: SHA-256",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_one_line_that_names_the_chunk(copy, kind):
    name = damage(copy, kind)
    stream = TokenStream(copy)
    assert len(stream.read(0, 0, 10)) == 10
    with pytest.raises(UserError, match=DAMAGES[kind]) as error:
        stream.read(1, 0, 10)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_checking_digests_can_be_turned_off(copy):
    damage(copy, "corrupt")
    assert len(TokenStream(copy, verify=False).read(1, 0, 10)) == 10


def test_no_card_is_one_line(tmp_path):
    with pytest.raises(UserError, match="has no card.json: run python src/prepare.py"):
        TokenStream(tmp_path)


@pytest.mark.s3
class TestObjectStore:
    def test_remote_equals_local(self, source, s3, tmp_path):
        url = s3.upload(source, "remote_equals_local")
        cache = ChunkCache(tmp_path / "cache", 10**8, s3.storage_options)
        remote, local = TokenStream(url, cache=cache), TokenStream(source)
        for i, tokens in enumerate(local.chunk_tokens):
            assert (remote.read(i, 0, tokens) == local.read(i, 0, tokens)).all()

    def test_a_small_cache_stays_small_and_right(self, source, s3, tmp_path):
        url = s3.upload(source, "small_cache")
        local = TokenStream(source)
        size = max(chunk.bytes for chunk in local.chunks)
        cache = ChunkCache(tmp_path / "cache", 2 * size, s3.storage_options)
        rng = np.random.default_rng(0)
        for i in rng.integers(0, len(local.chunks), 30).tolist():
            remote = TokenStream(url, cache=cache)  # opens nothing that an earlier one holds
            assert (remote.read(i, 5, 40) == local.read(i, 5, 40)).all()
            kept = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.bin"))
            assert kept <= 2 * size

    def test_a_copy_that_went_bad_is_fetched_again(self, source, s3, tmp_path):
        url = s3.upload(source, "bad_copy")
        cache = ChunkCache(tmp_path / "cache", 10**8, s3.storage_options)
        whole = np.array(TokenStream(url, cache=cache).read(0, 0, 100))
        (copy,) = (tmp_path / "cache").rglob("*.bin")
        data = bytearray(copy.read_bytes())
        data[50] ^= 1
        copy.unlink()  # not in place: the first reader still has the old file mapped
        copy.write_bytes(data)
        assert (TokenStream(url, cache=cache).read(0, 0, 100) == whole).all()

    @pytest.mark.parametrize("kind", ["missing", "truncated", "corrupt"])
    def test_damage_in_the_store_is_one_line(self, copy, s3, tmp_path, kind, monkeypatch):
        monkeypatch.setattr("smol.data.streams.FETCH_BACKOFF_SECONDS", 0.01)
        name = damage(copy, kind)
        url = s3.upload(copy, f"damage_{kind}")
        cache = ChunkCache(tmp_path / "cache", 10**8, s3.storage_options)
        stream = TokenStream(url, cache=cache)
        with pytest.raises(UserError, match="cannot read s3://") as error:
            stream.read(1, 0, 10)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
        assert not list((tmp_path / "cache").rglob("*.bin"))

    def test_a_worker_leaves_the_session_of_its_parent_alone(self, source, s3, tmp_path, capfd):
        """Closing it from another event loop would print tracebacks amidst the training."""
        url = s3.upload(source, "fork")
        S3FileSystem.clear_instance_cache()  # sessions other tests left to nobody: they are
        gc.collect()  # closed here, lest the worker do it
        cache = ChunkCache(tmp_path / "cache", 10**8, s3.storage_options)
        stream = TokenStream(url, cache=cache)  # has read the card

        async def collect():  # as may happen amidst any transfer
            gc.collect()
            await asyncio.sleep(0.2)

        def read():
            logging.getLogger().handlers = []  # what asyncio has to say goes to the terminal
            stream.read(0, 0, 10)
            sync(get_loop(), collect)
            gc.collect()

        worker = get_context("fork").Process(target=read)
        worker.start()
        worker.join()
        assert worker.exitcode == 0
        assert list((tmp_path / "cache").rglob("*.bin"))
        assert capfd.readouterr().err == ""

    def test_interrupted_equals_uninterrupted(self, source, s3, tmp_path):
        """The loader over the store, with workers, against the loader over the disk."""
        from memory_sources import step_ids

        from smol.data.curriculum import Curriculum
        from smol.data.loader import Layout, PositionLoader
        from smol.data.spans import SourceOrder
        from smol.data.stages import SourceConfig, StageConfig, plan

        url = s3.upload(source, "interrupted")
        cache = ChunkCache(tmp_path / "cache", 10**8, s3.storage_options)

        def loader(stream, workers, history=()):
            orders = {"cats": SourceOrder("cats", stream.chunk_tokens, 64, 64, 2, seed=1)}
            digests = {"cats": stream.card.digest}
            stages = {"s": StageConfig({"cats": SourceConfig("", 1.0)}, start_step=0)}
            segments = plan(stages, digests, 64, 512, history)
            curriculum = Curriculum(segments, orders, digests)
            made = PositionLoader(curriculum, {"cats": stream}, 0, Layout(0, 1, 256), workers)
            made.seek(history[-1].stop if history else 0)
            return made

        expected = step_ids([loader(TokenStream(source), 0)], 90)
        for workers, stop in ((0, 31), (2, 47)):
            first = loader(TokenStream(url, cache=cache), workers)
            assert step_ids([first], stop) == expected[:stop]
            history = first.curriculum.history(first.position)
            second = loader(TokenStream(url, cache=cache), workers, history)
            assert step_ids([second], 90 - stop) == expected[stop:]
