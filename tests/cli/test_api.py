"""The suite from Python."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import clbench
from clbench.api import parse_seeds

QUICK = {"method": "er", "scenario": "split-digits", "scenario_params": {"per_class": 24}, "epochs": 1}


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("given", "seeds"),
    [("0", [0]), ("0-2,7", [0, 1, 2, 7]), ("3, 1-2", [3, 1, 2]), ("1,1-2", [1, 2]), (5, [5]), ([4, 2, 4], [4, 2])],
)
def test_seeds(given: object, seeds: list[int]) -> None:
    assert parse_seeds(given) == seeds


@pytest.mark.parametrize("given", ["", "-1", "1-", "a", "2-1", "1.5", "0-1000", [], [-1], "0,,1", "٣"])
def test_bad_seeds(given: object) -> None:
    with pytest.raises(clbench.InputError):
        parse_seeds(given)


def test_run_gives_results_and_the_same_again(capsys: pytest.CaptureFixture[str]) -> None:
    results = clbench.run(**QUICK, seeds=[0, 3])
    assert capsys.readouterr() == ("", "")
    assert (len(results), results.seeds, [run.status for run in results]) == (2, (0, 3), ["done", "done"])
    values = [run.summary["final_accuracy"] for run in results]
    assert results.mean("final_accuracy") == pytest.approx(sum(values) / 2)
    assert results.aggregate()["final_accuracy"].num == 2
    table = results.table()
    assert table.seed.tolist() == [0, 3]
    assert table.final_accuracy.tolist() == values
    assert (results[0].path / "curve.png").is_file()

    again = clbench.run(**QUICK, seeds=3)
    assert again[0].status == "found"
    assert again[0].summary["final_accuracy"] == values[1]
    with pytest.raises(clbench.InputError, match="did you mean 'final_accuracy'"):
        results.mean("final_acuracy")


def test_load_runs_is_a_table_of_all_runs() -> None:
    clbench.run(**QUICK, seeds="0-1")
    clbench.run(**{**QUICK, "method": "finetune"})
    runs = clbench.load_runs()
    assert isinstance(runs, pd.DataFrame)
    assert sorted(runs.method) == ["er", "er", "finetune"]
    assert (runs.state == "done").all()
    assert runs.final_accuracy.between(0, 1).all()
    assert runs[runs.method == "er"].seed.tolist() in ([0, 1], [1, 0])
    with pytest.raises(clbench.InputError, match="nowhere"):
        clbench.load_runs("nowhere")


def test_dry_run_is_near_the_truth() -> None:
    dry = clbench.dry_run(**QUICK)
    assert not dry.folders[0].exists()
    run = clbench.run(**QUICK)[0]
    assert run.path.resolve() == dry.folders[0].resolve()
    assert dry.estimate.num_steps == run.summary["steps"]
    assert dry.estimate.num_parameters == run.summary["num_parameters"]
    assert abs(dry.estimate.num_evaluations - run.summary["evaluations"]) <= 1  # and the untrained state
    size = sum(path.stat().st_size for path in run.path.iterdir() if path.suffix in (".parquet", ".csv"))
    assert dry.estimate.disk_bytes > size / 2
    assert dry.estimate.trial_steps > 0
    assert 0 < dry.estimate.train_s < 60


def test_dry_run_of_a_frozen_backbone_counts_its_features() -> None:
    dry = clbench.dry_run(**{**QUICK, "method": "nmc"})
    width, rows = dry.resolved.backbone.num_features, len(dry.resolved.feature_rows())
    assert dry.estimate.extract_s > 0
    assert dry.estimate.disk_bytes >= 4 * width * rows


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, clbench; clbench.__version__; clbench.InputError; print('torch' in sys.modules)"
    env = {"PYTHONPATH": str(Path(clbench.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == "False"
    assert {"run", "load_runs", "dry_run"} <= set(dir(clbench))
    with pytest.raises(AttributeError, match="runn"):
        _ = clbench.runn
