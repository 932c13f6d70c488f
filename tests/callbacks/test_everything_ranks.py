"""All callbacks under tensor parallelism: what they count is counted once, and what they guard."""

import json
from pathlib import Path

import pytest
from everything_ranks import FAULTS, run
from test_everything import rows
from warm_python import python

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(sources, tmp_path_factory):
    """Folders of one process, of two ranks, and of two ranks with faults."""
    folder = tmp_path_factory.mktemp("callbacks")
    names = [folder / name for name in ("one", "two", "faults")]
    run(sources, names[0])
    jobs = [
        {"sources": str(sources), "folder": str(names[1]), "faults": []},
        {"sources": str(sources), "folder": str(names[2]), "faults": FAULTS},
    ]
    done = python(Path(__file__).with_name("everything_ranks.py"), json.dumps(jobs), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return names


def test_what_is_logged_is_what_one_process_logs(folders):
    one, two = (rows(folder) for folder in folders[:2])
    assert len(one) == len(two) > 12
    for ours, theirs in zip(two, one, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if value or ours[name]:  # else neither logged it in this row
                assert float(ours[name]) == pytest.approx(float(value), rel=1e-3), name


def test_each_datum_is_counted_once(folders):
    losses = [json.loads((f / "loss_by_position.json").read_text()) for f in folders[:2]]
    for when in ("before", "after"):
        assert losses[1][when]["all"]["tokens"] == losses[0][when]["all"]["tokens"] > 0
    ledgers = [(f / "sources.json").read_text() for f in folders[:2]]
    assert ledgers[0] == ledgers[1]
    predictions = [(f / "predictions.jsonl").read_text().splitlines() for f in folders[:2]]
    texts = [[json.loads(line)["text"] for line in lines] for lines in predictions]
    assert texts[0] == texts[1] != []
    assert not (folders[1] / "predictions-1.jsonl").exists()


def test_the_warm_up_check_finds_no_rows_twice(folders):
    report = json.loads((folders[1] / "warmup_check.json").read_text())
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["data"]["values"]["shared_rows"] == 0  # and not all, as of other neighbours
    assert checks["throughput"]["values"]["unit"] == "tokens/s"
    assert report["passed"]


def test_the_model_writes_the_same_text(folders):
    one, two = ((folder / "samples.txt").read_text() for folder in folders[:2])
    assert one == two
    assert "--- step 12" in one


def test_what_one_rank_meets_both_avoid(folders):
    ends = [json.loads((folders[2] / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ends[0] == ends[1]
    assert ends[0][0] == 12  # all steps are taken in the end
    events = (folders[2] / "events.jsonl").read_text()
    assert events.count('"kind": "fault"') == len(FAULTS)
    assert events.count('"kind": "dropped_step"') + events.count('"kind": "rollback"') >= 4
