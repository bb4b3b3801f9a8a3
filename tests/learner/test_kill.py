"""`kill -9` at random moments, then the same command: the record is the same to the bit as an undisturbed run's.

CLBENCH_KILLS says how many moments (default 20 in the slow test).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMON = ["--scenario", "split-digits", "--checkpoint-every", "5", "--threads", "1"]
METHODS = {
    "er": ["--epochs", "6"],
    "slca": ["--epochs", "2", "--backbone", "mlp", "--set", "ca_epochs=3"],
    "nmc": ["--batch-size", "2"],
}
SAME = ("curve.parquet", "losses.parquet", "matrix.csv", "predictions.parquet")
TAKES_ANY_VALUE = ("times", "peak_memory_bytes")  # seconds and bytes of this very process


def command(method: str, out: Path) -> list[str]:
    return [sys.executable, "-m", "clbench", "run", "--method", method, *COMMON, *METHODS[method], "--out", str(out)]


def record(out: Path) -> dict[str, object]:
    done = list(out.glob("*/*/*/DONE"))
    assert len(done) == 1
    folder = done[0].parent
    summary = {k: v for k, v in json.loads((folder / "summary.json").read_text()).items() if k not in TAKES_ANY_VALUE}
    return {name: (folder / name).read_bytes() for name in SAME} | {"summary": summary}


def resumed(out: Path) -> bool:
    env = json.loads(next(iter(out.glob("*/*/*/env.json"))).read_text())
    return any("checkpoint" in note for entry in env for note in entry["notes"])


def start(method: str, out: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a run; returns as soon as it has saved a first checkpoint (or has ended)."""
    process = subprocess.Popen(command(method, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    while process.poll() is None and not list(out.glob("*/*/*/checkpoint/*.pt")):
        time.sleep(0.005)
    return process


def survive(method: str, folder: Path, kills: int, seed: int) -> int:
    """Kill fresh runs at `kills` moments between their first checkpoint and their end; returns how many of them went on
    from a checkpoint (the others were at their very end)."""
    env = {**os.environ, "CLBENCH_CACHE": str(folder / "cache")}
    whole = folder / "whole"
    subprocess.run(command(method, whole), check=True, capture_output=True, env=env)  # also fills the data cache
    process = start(method, folder / "again", env)
    begin = time.monotonic()
    assert process.wait() == 0
    length = time.monotonic() - begin
    expected = record(whole)
    assert record(folder / "again") == expected
    rng, count = random.Random(seed), 0
    for number in range(kills):
        out = folder / f"kill-{number}"
        process = start(method, out, env)
        time.sleep(length * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        result = subprocess.run(command(method, out), check=False, capture_output=True, env=env, text=True)
        assert result.returncode == 0, result.stderr
        assert record(out) == expected, f"killed at moment {number}: the record differs"
        count += resumed(out)
    return count


@pytest.mark.parametrize("method", METHODS)
def test_one_kill(method: str, tmp_path: Path) -> None:
    survive(method, tmp_path, kills=1, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_many_kills(method: str, tmp_path: Path) -> None:
    kills = int(os.environ.get("CLBENCH_KILLS", "20"))
    count = survive(method, tmp_path, kills=kills, seed=0)
    print(f"{method}: {kills} kills, {count} went on from a checkpoint, all the same to the bit")
    assert count > 0, "no kill fell behind the first checkpoint: nothing was tested"
