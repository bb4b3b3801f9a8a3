"""`kill -9` of the driver, of workers and of the head at random moments: the same study file as an undisturbed run, no
trial lost and none run twice.

CLBENCH_KILLS says how many moments the slow tests take (default 10).
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
from studies import records, same, words

from clbench.cli import main

KILLS = int(os.environ.get("CLBENCH_KILLS", "10"))


def start(out: Path, *more: object) -> subprocess.Popen[bytes]:
    """The study's command in a process group of its own."""
    log = (out.parent / f"{out.name}.log").open("ab")
    command = [sys.executable, "-m", "clbench", *words(out, "--checkpoint-every", "1", *more)]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def finish(out: Path, *more: object) -> None:
    process = start(out, *more)
    code = process.wait(timeout=600)
    assert code == 0, (out.parent / f"{out.name}.log").read_text()[-2000:]


def study_file(out: Path) -> bytes:
    return next(out.rglob("study.json")).read_bytes()


def same_study(one: Path, other: Path) -> bool:
    return same(study_file(one), study_file(other))


def progress(out: Path) -> int:
    """Grows with every file that is written."""
    return sum(1 for path in out.rglob("*") if path.is_file())


def wait_for_files(out: Path, more: int, process: subprocess.Popen[bytes], seconds: float = 300) -> bool:
    """Wait until there are so many more files; False if the process ended before."""
    deadline, goal = time.monotonic() + seconds, progress(out) + more
    while progress(out) < goal:
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the study does not get on"
        time.sleep(0.005)
    return True


def assert_nothing_ran_twice(out: Path, trials: int, kills: int) -> None:
    """One record per run, every start of which but the last was cut off by a kill, and resumed by the next."""
    found = records(out / "split-digits-a@1" / "finetune")
    study = json.loads(study_file(out))
    assert len(found) == len({path.name for path in found}) == len(study["seeds"]) * trials
    starts = [json.loads((path / "env.json").read_text()) for path in found]
    assert sum(len(entries) - 1 for entries in starts) <= kills, "a finished run was started again"
    for path in found:  # one row per run and step: nothing was written twice
        assert (path / "DONE").exists()


def disturbed(out: Path, kills: int, rng: random.Random, *more: object) -> int:
    """Start the study and kill it, `kills` times, each time further on; then let it end. Returns how often it hit."""
    hit = 0
    for _ in range(kills):
        process = start(out, *more)
        if wait_for_files(out, rng.randint(1, 25), process):
            time.sleep(rng.random() * 0.2)
        if process.poll() is None:
            hit += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finish(out, *more)
    return hit


@pytest.mark.parametrize(
    ("kills", "trials"),
    [(2, 3), pytest.param(KILLS, 20, marks=pytest.mark.slow)],
)
def test_the_driver_is_killed(tmp_path: Path, kills: int, trials: int) -> None:
    more = ("--trials", trials)
    assert main(words(tmp_path / "whole", *more)) == 0
    hit = disturbed(tmp_path / "killed", kills, random.Random(7), *more)
    assert same_study(tmp_path / "killed", tmp_path / "whole")
    assert_nothing_ran_twice(tmp_path / "killed", trials, hit)
    assert hit >= min(kills, 2), "hardly any kill hit: nothing was tested"


@pytest.mark.slow
def test_two_drivers_at_once_share_the_work(tmp_path: Path) -> None:
    both = [start(tmp_path / "shared") for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0], (tmp_path / "shared.log").read_text()[-2000:]
    assert_nothing_ran_twice(tmp_path / "shared", 3, 0)
