"""`clbench run` from beginning to end, on real digits."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from conftest import CommandLine

RECORD = {"spec.json", "env.json", "curve.parquet", "curve.png", "matrix.csv", "losses.parquet", "summary.json",
          "predictions.parquet", "DONE"}  # fmt: skip


def records(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.rglob("spec.json"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_process(*words: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "clbench", "run", "--method", "er", "--threads", "1", *words]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_several_seeds(run_quick: CommandLine, tmp_path: Path) -> None:
    code, out, err = run_quick("--seeds", "0-2")
    assert code == 0, err
    found = records(tmp_path / "results/runs/split-digits@1/er")
    assert len(found) == 3
    for record in found:
        assert {path.name for path in record.iterdir()} >= RECORD
        assert (record / "curve.png").read_bytes()[:4] == b"\x89PNG"
        assert f"record  {record.relative_to(tmp_path)}" in out
        assert f"curve   {record.relative_to(tmp_path)}/curve.png" in out
    for word in ("final accuracy", "seed 0", "seed 1", "seed 2", "mean", "std", "95 % ±", "accuracies in percent"):
        assert word in out
    assert "er on split-digits@1, seed 2 (3 of 3): " in err
    assert "final accuracy" not in err

    summaries = [json.loads((record / "summary.json").read_text()) for record in found]
    values = [100 * summary.get("metrics", summary)["final_accuracy"] for summary in summaries]
    lines = {line[:8].strip(): line[8:].split() for line in out.splitlines()}
    assert lines["mean"][0] == f"{statistics.mean(values):.1f}"
    assert lines["std"][0] == f"{statistics.stdev(values):.1f}"


def test_the_same_command_again_shows_the_run(run_quick: CommandLine, tmp_path: Path) -> None:
    first = run_quick()
    before = contents(tmp_path)
    again = run_quick()
    assert again.code == 0
    assert "(it had been run before)" in again.out
    assert again.out.replace(" (it had been run before)", "") == first.out
    assert contents(tmp_path) == before


def test_fresh_starts_beside_it(run_quick: CommandLine, tmp_path: Path) -> None:
    run_quick()
    before = contents(tmp_path)
    assert run_quick("--fresh").code == 0
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(records(tmp_path)) == 2


def test_options_reach_the_record_with_their_source(run_quick: CommandLine, tmp_path: Path) -> None:
    shown = run_quick(
        "--set", "capacity=17", "--batch-size", "6", "--order-seed", "5", "--out", "elsewhere", "--seeds", "3"
    )
    assert shown.code == 0, shown.err
    spec = json.loads((records(tmp_path / "elsewhere")[0] / "spec.json").read_text())
    assert spec["hyperparameters"]["capacity"] == {"value": 17, "source": "--set"}
    assert (spec["batch_size"], spec["epochs"], spec["seed"], spec["order_seed"]) == (6, 1, 3, 5)
    assert spec["scenario_params"]["per_class"] == 24


def test_dry_run_says_everything_and_writes_no_record(run_quick: CommandLine, tmp_path: Path) -> None:
    shown = run_quick("--dry-run", "--seeds", "0-1", "--set", "lr=0.05")
    assert shown.code == 0, shown.err
    assert not (tmp_path / "results").exists()
    lr = next(line for line in shown.out.splitlines() if line.startswith("--set lr"))
    assert lr.split() == ["--set", "lr", "0.05", "--set"]
    for word in ("each of 2 runs", "of memory", "on disk", "steps", "(new)"):
        assert word in shown.out
    run_quick()
    assert "(done)" in run_quick("--dry-run").out


def test_an_interrupted_run_goes_on_to_the_same_bits(clbench: CommandLine, tmp_path: Path) -> None:
    words = ("--scenario", "split-digits", "--scenario-set", "per_class=60", "--epochs", "12")
    process = run_process(*words, "--out", "stopped", cwd=tmp_path)
    assert process.stderr is not None
    while "steps" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip().splitlines()[-1] == (
        "error: interrupted; the checkpoint is saved, and the same command goes on from it"
    )
    assert "Traceback" not in err
    assert out == ""
    record = records(tmp_path / "stopped")[0]
    assert not (record / "DONE").exists()

    shown = clbench("run", "--method", "er", *words, "--out", "stopped")
    assert "going on from step" in shown.err
    assert len(json.loads((record / "env.json").read_text())) == 2
    clbench("run", "--method", "er", *words, "--out", "whole")
    for name in ("matrix.csv", "curve.parquet", "losses.parquet", "predictions.parquet"):
        assert (record / name).read_bytes() == (records(tmp_path / "whole")[0] / name).read_bytes(), name


def test_a_run_that_diverges_fails_with_one_sentence(run_quick: CommandLine, tmp_path: Path) -> None:
    run_quick("--out", "runs")
    before = contents(tmp_path / "runs")
    shown = run_quick("--out", "runs", "--set", "lr=10", "--set", "weight_decay=1", "--epochs", "3")
    assert shown.code == 1
    message = shown.err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert "nan" in message.lower() or "inf" in message.lower()
    assert "Traceback" not in shown.err
    after = contents(tmp_path / "runs")
    assert {name: after[name] for name in before} == before
