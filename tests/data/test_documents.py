"""Reading documents: formats, cuts into shards, the hub."""

import gzip
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_parts import all_texts, texts, write_jsonl  # noqa: F401

from smol.data.documents import Files, Piece, even_ranges, pack
from smol.data.hub import HubDataset
from smol.errors import UserError


def test_formats_hold_the_same_documents(tmp_path, texts):
    import pyarrow
    import pyarrow.parquet

    write_jsonl(tmp_path / "a.jsonl", texts)
    write_jsonl(tmp_path / "b.jsonl.gz", texts, gzip.open)
    with pyarrow.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as stream:
        stream.write((tmp_path / "a.jsonl").read_bytes())
    table = pyarrow.table({"n": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=100)
    (tmp_path / "e.txt").write_text("\n<|end|>\n".join(texts), encoding="utf-8")
    many = tmp_path / "many"
    many.mkdir()
    for i, text in enumerate(texts):
        (many / f"{i:04d}.txt").write_text(text, encoding="utf-8")
    small = {"shard_bytes": 40_000}
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        assert all_texts(Files((str(tmp_path / name),), **small)) == texts, name
    assert all_texts(Files((str(tmp_path / "e.txt"),), separator="<|end|>")) == texts
    assert all_texts(Files((str(many / "*.txt"),), **small)) == texts
    assert all_texts(Files((str(many),), **small)) == texts
    assert all_texts(Files((f"file://{tmp_path}/a.jsonl",), **small)) == texts
    assert len(Files((str(tmp_path / "d.parquet"),), **small).shards()) > 1
    assert len(Files((str(many),), **small).shards()) < 10


def test_hub_datasets(tmp_path, texts, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files" / "train.jsonl", texts)
    assert sorted(all_texts(HubDataset(str(tmp_path / "files")))) == sorted(texts)
    datasets.Dataset.from_dict({"body": texts}).save_to_disk(tmp_path / "saved")
    saved = HubDataset(str(tmp_path / "saved"), field="body", shard_bytes=20_000)
    assert len(saved.shards()) > 2
    assert all_texts(saved) == texts
    with pytest.raises(UserError, match=r"no field 'bdy'.*Did you mean 'body'"):
        HubDataset(str(tmp_path / "saved"), field="bdy").shards()
    with pytest.raises(UserError, match="cannot be loaded"):
        HubDataset(str(tmp_path / "nowhere")).shards()


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), min_size=1),
    shard_bytes=st.integers(1, 300),
)
def test_cuts_of_a_jsonl_file_lose_and_repeat_nothing(tmp_path_factory, texts, shard_bytes):
    path = write_jsonl(tmp_path_factory.mktemp("cut") / "in.jsonl", texts)
    assert all_texts(Files((str(path),), shard_bytes=shard_bytes)) == texts


@given(sizes=st.lists(st.integers(0, 50)), limit=st.integers(1, 60))
def test_pack_keeps_order_and_size(sizes, limit):
    pieces = [Piece(str(i), size) for i, size in enumerate(sizes)]
    shards = pack(pieces, limit, iter)
    assert [piece for shard in shards for piece in shard.pieces] == pieces
    assert all(shard.size <= 2 * limit + max(sizes) for shard in shards)


@given(total=st.integers(0, 10**6), parts=st.floats(0, 50))
def test_even_ranges_cover(total, parts):
    ranges = list(even_ranges(total, parts))
    assert [ranges[0][0], ranges[-1][1]] == [0, total]
    assert all(a[1] == b[0] for a, b in pairwise(ranges))
    lengths = [stop - start for start, stop in ranges]
    assert max(lengths) - min(lengths) <= 1
