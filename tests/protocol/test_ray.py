"""The same studies on a local Ray cluster of two nodes, with workers, head and driver killed. Slow: Ray takes seconds to
start. What needs no cluster stands at the end.
"""

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from studies import plan, records
from test_kills import KILLS, assert_nothing_ran_twice, finish, progress, same_study, start, wait_for

from clbench.errors import InputError
from clbench.protocol.engines import InProcess, Ray, reach
from clbench.protocol.search import SearchPlan
from clbench.protocol.study import prepare, tune

ROOT = Path(__file__).parents[2]


def node(*words: str) -> None:
    """Start a Ray node as a user would, with `ray start`. It is reached from this machine only, with the token."""
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--num-cpus=2",
               "--disable-usage-stats", "--object-store-memory=100000000", "--node-ip-address=127.0.0.1",
               *words]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes(folder: Path, *names: str) -> list[int]:
    """Pids of this test's Ray processes: those with its temporary folder in their command line or environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            about = line + (path / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in about and any(name in line for name in names):
            found.append(int(path.name))
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


class LocalCluster:
    """A head and a second node on this machine, in a temporary folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = ""

    def up(self) -> str:
        port = free_port()
        node("--head", f"--port={port}", f"--temp-dir={self.folder}", "--include-dashboard=false", "--min-worker-port=0",
             "--max-worker-port=0")  # fmt: skip
        self.address = f"127.0.0.1:{port}"
        node(f"--address={self.address}")
        return self.address

    def down(self) -> None:
        names = ("gcs_server", "raylet", "ray::", "default_worker", "ray/_private", "ray/dashboard", "log_monitor",
                 "monitor.py")  # fmt: skip
        kill(processes(self.folder, *names))
        deadline = time.monotonic() + 20
        while processes(self.folder, *names) and time.monotonic() < deadline:
            time.sleep(0.1)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """A cluster that only this test can join: recent Ray asks for a token, and whoever has it can run code here."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # sockets need a short path
    made = LocalCluster(folder)
    try:
        yield made
    finally:
        made.down()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_two_nodes_give_the_same_study(cluster: LocalCluster, tmp_path: Path) -> None:
    finish(tmp_path / "here")
    finish(tmp_path / "there", "--engine", "ray", "--address", cluster.up())
    assert same_study(tmp_path / "there", tmp_path / "here")
    assert_nothing_ran_twice(tmp_path / "there", 3, 0)


@pytest.mark.slow
def test_workers_are_killed(cluster: LocalCluster, tmp_path: Path) -> None:
    more = ("--trials", 8)
    finish(tmp_path / "whole", *more)
    rng, hit, out = random.Random(3), 0, tmp_path / "killed"
    process = start(out, *more, "--engine", "ray", "--address", cluster.up(), "--retries", "50")
    for _ in range(KILLS):
        goal = progress(out) + rng.randint(1, 12)
        if not wait_for(lambda goal=goal: progress(out) >= goal, process):  # type: ignore[misc]
            break
        at_work = processes(cluster.folder, "ray::_on_worker")
        if at_work:
            kill([rng.choice(at_work)])
            hit += 1
    assert process.wait(timeout=600) == 0, (tmp_path / "killed.log").read_text()[-2000:]
    assert same_study(out, tmp_path / "whole")
    assert_nothing_ran_twice(out, 8, hit)
    assert hit >= 2, "hardly any worker was hit: nothing was tested"


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["driver", "head"])
def test_driver_or_head_is_killed(cluster: LocalCluster, tmp_path: Path, victim: str) -> None:
    more = ("--trials", 8)
    finish(tmp_path / "whole", *more)
    rng, out, kills = random.Random(5), tmp_path / "killed", 2
    address = cluster.up()
    for _ in range(kills):
        process = start(out, *more, "--engine", "ray", "--address", address)
        goal = progress(out) + rng.randint(5, 40)
        assert wait_for(lambda goal=goal: progress(out) >= goal, process), (tmp_path / "killed.log").read_text()[-2000:]  # type: ignore[misc]
        if victim == "driver":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            kill(processes(cluster.folder, "gcs_server", "raylet"))
            try:
                process.wait(timeout=90)  # it gives up by itself, or
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            cluster.down()
            address = cluster.up()
        process.wait()
    finish(out, *more, "--engine", "ray", "--address", address)
    assert same_study(out, tmp_path / "whole")
    assert_nothing_ran_twice(out, 8, 2 * kills * 2)  # up to four runs were at work at each kill


@pytest.mark.slow
def test_ray_on_this_machine_and_a_study_that_moves(tmp_path: Path) -> None:
    """Begun in-process, finished on Ray: the same file; and a failing trial fails there too, with its reason."""
    pytest.importorskip("ray")
    here = prepare(plan(tmp_path / "here"))
    tune(here, InProcess())
    there = plan(tmp_path / "there")

    class Enough(Exception):
        pass

    def stop(finished: int, *_: Any) -> None:
        if finished == 3:
            raise Enough

    with pytest.raises(Enough):
        tune(prepare(there), InProcess(), stop)
    ray = Ray(cpus=0.5)
    try:
        tune(prepare(there), ray)
        assert prepare(there).file.read_bytes() == here.file.read_bytes()
        with pytest.raises(InputError, match="no node of the cluster has"):
            tune(prepare(plan(tmp_path / "much", search=SearchPlan("uniform", 1))), Ray(cpus=4096, _ray=ray._ray))
        with pytest.raises(InputError, match="trial 0, seed 0.*not here"):
            wild = plan(tmp_path / "bad", where={"device": "cpu", "threads": 1, "data": [], "weights": None})
            prepared = prepare(wild)
            refuse = tmp_path / "bad" / "refuse.py"
            refuse.parent.mkdir(parents=True, exist_ok=True)
            refuse.write_text(REFUSES)
            tune(prepare(plan(tmp_path / "bad", method=str(refuse))), ray)
        assert not prepared.file.exists()
    finally:
        ray.close()
    assert len(records(tmp_path / "there")) == 6


REFUSES = '''"""A method that cannot be made."""
from clbench.errors import InputError
from clbench.methods.finetune import Finetune

class Refuses(Finetune):
    def __init__(self, config, backbone, setting):
        raise InputError("not here")

METHOD = Refuses
'''


# -- without a cluster -----------------------------------------------------------------------------------------------
def test_an_unreachable_cluster_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    begin = time.monotonic()
    with pytest.raises(InputError, match="cannot reach a Ray cluster at 127.0.0.1:1.*ray start --head"):
        tune(prepare(plan(tmp_path)), Ray("127.0.0.1:1"))
    assert time.monotonic() - begin < 30
    assert not records(tmp_path)
    with pytest.raises(InputError, match="cannot reach"):
        reach("ray://127.0.0.1:1")


def test_missing_ray_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"clbench\[cluster\]"):
        tune(prepare(plan(tmp_path)), Ray())
