"""The same studies on a local Ray cluster of two nodes, with workers, head and driver killed. Slow: Ray takes seconds
to start. What needs no cluster stands at the end.
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
from studies import plan, records, same
from test_kills import KILLS, assert_nothing_ran_twice, finish, same_study, start, wait_for_files

from clbench.errors import InputError
from clbench.protocol.engines import InProcess, Ray, reach
from clbench.protocol.search import SearchPlan
from clbench.protocol.study import prepare, tune

ROOT = Path(__file__).parents[2]


def node(*words: str) -> None:
    """Start a Ray node as a user would, with `ray start`. Nobody joins it without the token of the fixture."""
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--num-cpus=2",
               "--disable-usage-stats", "--object-store-memory=100000000", *words]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes(folder: Path, *names: str) -> list[int]:
    """Pids of this test's Ray processes: those with its temporary folder in their command line, and what they started
    (workers rename themselves)."""
    lines: dict[int, str] = {}
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            lines[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    ours = {pid for pid, line in lines.items() if str(folder) in line}
    while more := {pid for pid, parent in parents.items() if parent in ours and pid in lines} - ours:
        ours |= more
    return [pid for pid in ours if any(name in lines[pid] for name in names)]


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
        node("--head", f"--port={port}", f"--temp-dir={self.folder}", "--include-dashboard=false")
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
        if not wait_for_files(out, rng.randint(1, 12), process):
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
        assert wait_for_files(out, rng.randint(5, 40), process), (tmp_path / "killed.log").read_text()[-2000:]
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
        assert same(prepare(there).file.read_bytes(), here.file.read_bytes())
        with pytest.raises(InputError, match="no node of the cluster has"):
            tune(prepare(plan(tmp_path / "much", search=SearchPlan("uniform", 1))), Ray(cpus=4096, _ray=ray._ray))
        refuse = tmp_path / "refuse.py"
        refuse.write_text(REFUSES)
        refused = prepare(plan(tmp_path / "bad", method=str(refuse)))
        with pytest.raises(InputError, match=r"trial \d, seed \d: not here"):
            tune(refused, ray)
        assert not refused.file.exists()
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
    with pytest.raises(InputError, match=r"cannot reach a Ray cluster at 127.0.0.1:1.*ray start --head"):
        tune(prepare(plan(tmp_path)), Ray("127.0.0.1:1"))
    assert time.monotonic() - begin < 30
    assert not records(tmp_path)
    with pytest.raises(InputError, match="cannot reach"):
        reach("ray://127.0.0.1:1")


def test_missing_ray_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"clbench\[cluster\]"):
        tune(prepare(plan(tmp_path)), Ray())
