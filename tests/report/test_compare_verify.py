"""`clbench compare` and `clbench verify`, on records made for it and on a real small run."""

import json
from pathlib import Path

import numpy as np
import pytest
from made import commit, edit, hyperparameter, write

import clbench
from clbench.cli import main
from clbench.errors import InputError
from clbench.report.compare import compare, draw_overlay
from clbench.report.verify import Rerun, rerun, verify


def test_rows_are_compared_over_their_seeds(tmp_path: Path) -> None:
    for seed in range(4):
        a = write(tmp_path, "er", seed=seed, level=0.6)
        changed = {"lr": hyperparameter(0.5, "--set"), "capacity": hyperparameter(200, "default")}
        b = write(tmp_path, "er", seed=seed, level=0.9, batch_size=64, hyperparameters=changed)
    found = compare(a, b, ["final_accuracy", "min_accuracy"])
    assert found.seeds == (4, 4)
    assert found.refused == ()
    assert {(d.what, d.a, d.b) for d in found.spec} == {
        ("batch_size", "10", "64"), ("hyperparameter lr", "0.1", "0.5"),
        ("hyperparameters from", "default", "set by hand"),
    }  # fmt: skip
    assert found.environment == ()
    first = found.outcomes[0]
    assert first.test is not None
    assert first.test.num == 4
    assert first.test.difference == pytest.approx(first.a - first.b)  # type: ignore[operator]
    assert first.holm is not None
    picture = draw_overlay(found, tmp_path / "curves.png")
    assert picture is not None
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mask": "all"}, "mask seen against all"),
        ({"scenario_params": {"tasks": 3, "per_class": 5}}, "scenario parameter per_class=None against 5"),
        ({"protocol_family": "B"}, "protocol family None against B"),
        ({"scenario_fingerprint": "00" * 32}, "order seed 0 gave table"),
    ],
)
def test_what_may_not_be_compared_is_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    a, b = write(tmp_path / "a", "er"), write(tmp_path / "b", "clib", **change)
    found = compare(a, b)
    assert any(text.startswith(reason) for text in found.refused), found.refused
    assert all(outcome.test is None for outcome in found.outcomes)


def test_another_schedule_refuses_curve_metrics_alone(tmp_path: Path) -> None:
    for seed in range(3):
        a, b = write(tmp_path, "er", seed=seed), write(tmp_path, "clib", seed=seed, eval_every=9)
    tested = {outcome.metric: outcome.test is not None for outcome in compare(a, b).outcomes}
    assert tested["final_accuracy"]
    assert not tested["min_accuracy"]


def test_two_runs_of_one_row_are_compared_as_runs(tmp_path: Path) -> None:
    a, b = write(tmp_path, "er", seed=0), write(tmp_path, "er", seed=1)
    found = compare(a, b)
    assert found.seeds == (1, 1)
    assert {"seed", "order_seed"} <= {difference.what for difference in found.spec}
    assert not found.identical
    copy = write(tmp_path / "other", "er", seed=0)
    assert compare(a, copy).identical


def test_bad_input_of_compare(tmp_path: Path) -> None:
    run = write(tmp_path / "a", "er")
    write(tmp_path / "a", "clib")
    with pytest.raises(InputError, match="there is no folder"):
        compare(run, tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds 2 rows"):
        compare(run, tmp_path / "a")
    with pytest.raises(InputError, match="no finished run"):
        compare(run, write(tmp_path / "b", "er", state="unfinished"))
    with pytest.raises(InputError, match="did you mean 'final_accuracy'"):
        compare(run, run, ["final_acuracy"])


def failed(path: Path) -> dict[str, str]:
    return {check.name: check.detail for check in verify(path) if check.ok is False}


def test_a_sound_record_verifies_and_a_changed_one_does_not(tmp_path: Path) -> None:
    run = write(tmp_path, "er")
    assert failed(run) == {}
    assert {check.name for check in verify(run) if check.ok} == {"files", "accuracy matrix from predictions", "metrics"}
    edit(run / "summary.json", final_accuracy=0.999)
    assert "final_accuracy is 0.999" in failed(run)["metrics"]
    other = write(tmp_path, "er", seed=1)
    table = other / "matrix.csv"
    lines = table.read_text().splitlines()
    lines[-1] = ",".join([lines[-1].split(",")[0], *("0.0125" for _ in range(3))])
    table.write_text("\n".join(lines) + "\n")
    found = failed(other)
    assert "sha256 differs" in found["files"] or "bytes instead of" in found["files"]
    assert "3 entries differ, first after task 2" in found["accuracy matrix from predictions"]
    assert "final_accuracy" in found["metrics"]


def test_a_damaged_curve_fails_and_a_committed_record_says_what_it_lacks(tmp_path: Path) -> None:
    run = write(tmp_path, "er")
    commit(run)
    assert failed(run) == {}
    assert {check.name: check.detail for check in verify(run)}[
        "metrics"
    ] == "there is no matrix.csv to compute them from"
    broken = write(tmp_path, "er", seed=1)
    (broken / "curve.parquet").write_bytes(b"PAR1")
    assert "damaged" in failed(broken)["stored files"]


def test_a_study_is_sent_to_its_own_command(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(InputError, match="clbench protocol show"):
        verify(tmp_path)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run, small: the nearest class mean on the embedded digits."""
    results = clbench.run("nmc", "split-digits", threads=1, eval_every=20, keep_weights=True,
                          out=tmp_path_factory.mktemp("real"))  # fmt: skip
    return results[0].path


def test_a_real_run_verifies_and_repeats_to_the_bit(real: Path) -> None:
    found = {check.name: check.ok for check in verify(real)}
    assert found.pop("other metrics", None) is None  # a record does not hold the parts of subsets
    assert found == {
        "files": True, "accuracy matrix from predictions": True, "metrics": True, "weights": True
    }  # fmt: skip
    checks = {check.name: check.ok for check in rerun(real, Rerun())}
    assert checks.pop("losses.parquet") in (True, None)
    assert set(checks.values()) == {True}
    assert {"weights", "curve.parquet", "matrix.csv", "predictions.parquet", "metrics"} <= set(checks)


def test_a_rerun_that_differs_says_where(real: Path, tmp_path: Path) -> None:
    fake = tmp_path / "fake"
    fake.mkdir()
    for file in real.iterdir():
        if file.is_file() and file.name not in (".lock", "DONE"):
            (fake / file.name).write_bytes(file.read_bytes())
    edit(fake / "summary.json", weights_sha256="00" * 32, final_accuracy=0.5)
    found = {check.name: check for check in rerun(fake, Rerun())}
    assert found["weights"].ok is False
    assert "final_accuracy: 0.5 then" in found["metrics"].detail
    assert found["curve.parquet"].ok
    assert "environment" in found
    edit(fake / "spec.json", scenario_fingerprint="00" * 32)
    (check,) = rerun(fake, Rerun())
    assert check.ok is False
    assert "scenario_fingerprint: 000" in check.detail


def test_a_rerun_asks_for_files_that_the_record_only_names(tmp_path: Path) -> None:
    run = write(tmp_path, "mine", method_file="ab" * 32)
    with pytest.raises(InputError, match="--method FILE"):
        rerun(run, Rerun())


def test_commands(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        a, b = write(tmp_path / "runs", "er", seed=seed), write(tmp_path / "runs", "clib", seed=seed)
    assert main(["report", "--runs", "runs", "--out", "out"]) == 0
    assert "1 tables, 2 rows, 6 finished runs" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "index.html", "leaderboard.md", "leaderboard.csv", "runs.csv", "leaderboard.tex"
    }  # fmt: skip
    assert main(["compare", str(a), str(b), "--metric", "final_accuracy"]) == 0
    out = capsys.readouterr().out
    assert "p (Holm)" in out
    assert Path(f"results/compare/{a.name}--{b.name}.png").exists()
    assert main(["verify", str(real)]) == 0
    assert "ok    metrics" in capsys.readouterr().out
    edit(a / "summary.json", forgetting=0.9)
    assert main(["verify", str(a)]) == 1
    assert "FAIL  metrics" in capsys.readouterr().out
    assert main(["verify", str(a), "--threads", "1"]) == 2
    assert "are for --rerun" in capsys.readouterr().err
    assert main(["report", "--runs", "nowhere"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err


def test_a_thinned_curve_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    run = write(tmp_path, "er")
    record = clbench.store.RunRecord(run)
    curve = record.read_curve()
    keep = np.arange(0, len(curve.steps), 2)
    (run / "DONE").unlink()
    record.write_curve(
        type(curve).of(
            steps=curve.steps[keep], task=curve.task[keep], hits=curve.hits[keep], valid=curve.valid[keep],
            totals=curve.totals, groups=curve.groups, group_task=curve.group_task, task_ends=curve.task_ends,
        )
    )  # fmt: skip
    checks = {check.name: check for check in verify(run)}
    assert checks["metrics"].ok
    assert "thinned" in checks["other metrics"].detail
    assert json.loads((run / "summary.json").read_text())["evaluations"] == len(curve.steps)
