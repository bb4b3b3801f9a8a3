"""`clbench protocol` and `clbench sweep` as a user meets them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from studies import records, words

from clbench.cli import main
from clbench.errors import InputError
from clbench.protocol.cli import names, scoped, seed_list


def test_tune_freeze_score_show_and_evaluate_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tmp_path, "--eval", "split-digits-b", "--seeds", "2")) == 0
    shown = capsys.readouterr()
    assert "2 of 2" in shown.out
    assert "trial 2, seed 1: done" in shown.err
    study = next(tmp_path.rglob("study.json"))
    folder = tmp_path / "split-digits-a@1--split-digits-b@1"
    assert {path.name for path in folder.iterdir()} == {
        "report.md", "results.csv", "finetune-trials.csv", "finetune-best-of.csv",
    }  # fmt: skip
    before = records(tmp_path)
    assert main(words(tmp_path, "--eval", "split-digits-b", "--seeds", "2")) == 0
    assert records(tmp_path) == before
    capsys.readouterr()
    assert main(["protocol", "show", str(study), "--records"]) == 0
    assert "the run records say the same" in capsys.readouterr().out
    again = ("--eval", "split-digits-b", "--eval-set", "per_class=12", "--seeds", "7,9", "--device", "cpu")
    assert main(["protocol", "run", "--study", str(study), *again, "--out", str(tmp_path)]) == 0
    evaluations = sorted((study.parent / "evaluation").glob("*.json"))
    assert len(evaluations) == 2
    assert sorted(json.loads(path.read_text())["seeds"] for path in evaluations) == [[0, 1], [7, 9]]
    capsys.readouterr()
    assert main(["protocol", "show", str(evaluations[0])]) == 0
    assert "tuned on split-digits-a@1" in capsys.readouterr().out
    study.write_text(study.read_text().replace('"trial": 1', '"trial": 0', 1))
    assert main(["protocol", "show", str(study)]) == 2
    assert "has been changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--trials", "0"], "at least one trial"),
        (["--search", "grid"], "search"),
        (["--eval", "split-digits"], "share classes"),
        (["--conventional"], "--conventional"),
        (["--engine", "slurm"], "engine"),
        (["--address", "auto"], "--engine ray"),
        (["--space", "er.lr=0.1"], "method in --space"),
        (["--tune-seeds", "3-1"], "must go up"),
        (["--tune-seeds", "0"], "number of seeds"),
        (["--val-share", "1"], "--val-share"),
        (["--study", "x.json"], "neither --method nor --tune"),
        (["--engine", "ray", "--cpus-per-trial", "-1"], "cannot be negative"),
    ],
)
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], problem: str) -> None:
    given = words(tmp_path)
    if more[0] in given:
        at = given.index(more[0])
        given[at : at + 2] = more
    else:
        given += more
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1
    assert problem in error
    assert not records(tmp_path)


def test_seeds_names_and_scopes() -> None:
    assert seed_list("--seeds", "5") == (0, 1, 2, 3, 4)
    assert seed_list("--seeds", "1993,1996") == (1993, 1996)
    assert names("--method", ["a, b", "a"]) == ["a", "b"]
    with pytest.raises(InputError):
        names("--method", None)
    found = scoped("--set", ["lr=1", "er.lr=2", "mine.depth=3"], ["er", "/x/mine.py"])
    assert found == {"er": {"lr": "2"}, "/x/mine.py": {"lr": "1", "depth": "3"}}


def test_a_grid_is_run_named_and_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["sweep", "--method", "finetune,nmc", "--scenario", "split-digits-a", "--seeds", "2", "--epochs", "1",
            "--scenario-set", "per_class=12", "--device", "cpu", "--out", str(tmp_path)]  # fmt: skip
    assert main(grid) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in shown[1:3]] == [
        ["split-digits-a@1", "finetune", "2"], ["split-digits-a@1", "nmc", "2"],
    ]  # fmt: skip
    assert len(records(tmp_path)) == 4
    starts = {path: path.read_bytes() for path in tmp_path.rglob("env.json")}
    assert main(grid) == 0
    assert {path: path.read_bytes() for path in tmp_path.rglob("env.json")} == starts


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from clbench.cli import main; main(['protocol', 'run', '--help']); main(['sweep', '--help']); "
        "print([m for m in ('torch', 'ray', 'optuna', 'mlflow', 'pandas', 'scipy', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().splitlines()[-1] == "[]"
