"""python src/report.py, as it is typed."""

from warm_python import python

from smol.paths import project_root


def report(*words, root):
    return python(project_root() / "src/report.py", *words, cwd=root, SMOL_ROOT=str(root))


def test_a_report_and_a_mistake(tmp_path):
    run = tmp_path / "runs/small"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("step,train/loss\n1,3.5\n2,3.25\n")
    done = report("small", root=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"report      {run}/report.html\n"), done.stderr
    assert "3.250" in (run / "report.md").read_text()
    done = report("smal", root=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no run smal")
    assert "small" in done.stderr.split("there is no run smal", 1)[1]
    assert done.stderr.count("\n") == 1
