"""Runs that take turns in one process: the same records as single runs, and one that breaks or stops hurts no other."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import clbench
from clbench.errors import InputError, RunFailed
from clbench.learner.resolve import Resolved, resolve
from clbench.learner.run import RunResult, run
from clbench.learner.side_by_side import run_side_by_side
from clbench.learner.spec import RunSpec

MEMBERS: list[dict[str, Any]] = [  # seeds, capacities and methods of different length
    {"method": "er", "seed": 0, "set": {"capacity": 20}},
    {"method": "er", "seed": 1, "set": {"capacity": 50}},
    {"method": "finetune", "seed": 0},
]
RECORDED = ("curve.parquet", "losses.parquet", "matrix.csv", "predictions.parquet")


def member(out: Path, **fields: Any) -> Resolved:
    """A short run on a few digits."""
    return resolve(
        RunSpec(
            scenario="split-digits", scenario_params={"per_class": 12}, epochs=2, eval_every=4, eval_per_group=10,
            device="cpu", out=out, **fields,
        )
    )  # fmt: skip


def recorded(path: Path) -> dict[str, Any]:
    """What a record says, times left out."""
    summary = json.loads((path / "summary.json").read_text())
    files = {name: (path / name).read_bytes() for name in RECORDED}
    return {**files, "weights": summary["weights_sha256"], "steps": summary["steps"]}


@pytest.mark.parametrize("width", [1, 2, 3])
def test_same_records_as_single_runs(tmp_path: Path, width: int) -> None:
    single = [run(member(tmp_path / "single", **fields)) for fields in MEMBERS]
    together = dict(run_side_by_side([member(tmp_path / "together", **fields) for fields in MEMBERS], width))
    assert sorted(together) == [0, 1, 2]
    for index, expected in enumerate(single):
        result = together[index]
        assert isinstance(result, RunResult)
        assert result.path.name == expected.path.name
        assert recorded(result.path) == recorded(expected.path)


def test_a_run_that_breaks_disturbs_no_other(tmp_path: Path) -> None:
    broken = {"method": "er", "seed": 2, "set": {"lr": 10.0, "momentum": 0.99, "weight_decay": 1.0}}
    expected = run(member(tmp_path / "single", **MEMBERS[0]))
    runs = [member(tmp_path / "together", **fields) for fields in (MEMBERS[0], broken, MEMBERS[2])]
    together = dict(run_side_by_side(runs, 3))
    assert isinstance(together[1], RunFailed)
    assert "loss" in str(together[1])
    kept = together[0]
    assert isinstance(kept, RunResult)
    assert recorded(kept.path) == recorded(expected.path)
    assert isinstance(together[2], RunResult)


class Interrupting:
    """Progress that presses Ctrl-C after some steps."""

    def __init__(self, at: int) -> None:
        self.at = at

    def begin(self, done: int, total: int) -> None:
        pass

    def stage(self, name: str, done: int, total: int) -> None:
        pass

    def update(self, done: int, **state: Any) -> None:
        if done >= self.at:
            os.kill(os.getpid(), signal.SIGINT)
            self.at = 10**9


def test_stopped_runs_all_save_and_go_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clbench.learner.learner.SHOW_SECONDS", 0.0)
    single = [run(member(tmp_path / "single", **fields)) for fields in MEMBERS]

    def runs() -> list[Resolved]:
        return [member(tmp_path / "together", **fields) for fields in MEMBERS]

    with pytest.raises(KeyboardInterrupt):
        dict(run_side_by_side(runs(), 3, lambda index: Interrupting(7) if index == 1 else None))
    saved = list((tmp_path / "together").rglob("checkpoint/*"))
    assert len({path.parent for path in saved}) == 3
    together = dict(run_side_by_side(runs(), 3))
    for index, expected in enumerate(single):
        result = together[index]
        assert isinstance(result, RunResult)
        assert recorded(result.path) == recorded(expected.path)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="same specification"):
        list(run_side_by_side([member(tmp_path, **MEMBERS[0]) for _ in range(2)], 2))
    with pytest.raises(InputError, match="--side-by-side is 0, it must be 1 or more"):
        clbench.run("er", "split-digits", seeds="0-1", side_by_side=0, out=tmp_path)
    assert list(run_side_by_side([], 2)) == []


def test_seeds_of_one_command(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "scenario_params": {"per_class": 12}, "epochs": 1, "eval_every": 0, "device": "cpu", "seeds": "0-2",
    }  # fmt: skip
    each = clbench.run("er", "split-digits", out=tmp_path / "each", **options)
    together = clbench.run("er", "split-digits", out=tmp_path / "together", side_by_side=2, progress=True, **options)
    assert together.table()["weights_sha256"].tolist() == each.table()["weights_sha256"].tolist()
    again = clbench.run("er", "split-digits", out=tmp_path / "together", side_by_side=2, **options)
    assert [result.status for result in again] == ["found"] * 3
