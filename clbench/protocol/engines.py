"""Where jobs run: in this process, one behind the other, or on a Ray cluster. Both give the same outcomes.

An engine is asked for the outcomes of a list of jobs. Outcomes that are on disk are taken from there; nothing else
carries over from one call to the next, so a study goes on from any kill, on any engine.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from clbench.errors import ClbenchError, InputError, RunFailed
from clbench.protocol.jobs import Job, Outcome, OutOfMemory, find_outcome, run_job

__all__ = ["Engine", "InProcess", "Ray", "Report"]

Report = Callable[[int, int, Job, Outcome], None]  # finished so far, total, and the one that has just finished
VISIBLE_SECONDS = 30.0  # a shared file system may show a file late
CONNECT_SECONDS = 5.0
HEAD_SECONDS, HEAD_TRIES = 5.0, 3
PASSED_ON = ("CLBENCH_DATA", "CLBENCH_CACHE")


class Engine(Protocol):
    def run(self, jobs: Sequence[Job], folder: Path, report: Report | None = None) -> dict[str, Outcome]:
        """Outcomes of all jobs, by key; `folder` keeps them. A job that stands twice is run once.

        Raises what `run_job` raises, and RunFailed if a job's process died too often. What is finished stays.
        """
        ...


def split_known(jobs: Iterable[Job], folder: Path) -> tuple[dict[str, Outcome], list[Job]]:
    """Outcomes that are known, and the jobs still to be run, each once."""
    known: dict[str, Outcome] = {}
    todo: dict[str, Job] = {}
    for job in jobs:
        if job.key in known or job.key in todo:
            continue
        outcome = find_outcome(job, folder)
        if outcome is None:
            todo[job.key] = job
        else:
            known[job.key] = outcome
    return known, list(todo.values())


class InProcess:
    """One job behind the other in this process."""

    def run(self, jobs: Sequence[Job], folder: Path, report: Report | None = None) -> dict[str, Outcome]:
        outcomes, todo = split_known(jobs, folder)
        total = len(outcomes) + len(todo)
        for job in todo:
            try:
                outcome = run_job(job, folder)
            except OutOfMemory as error:  # nobody else is here to blame
                outcome = Outcome("failed", reason=str(error))
            except ClbenchError as error:
                raise named(error, job) from error
            outcomes[job.key] = outcome
            if report is not None:
                report(len(outcomes), total, job, outcome)
        return outcomes


@dataclass
class Ray:
    """Jobs as Ray tasks, on this machine (address None) or on a running cluster.

    cpus, gpus: what a job takes; a fraction such as 0.25 of a GPU lets four jobs share one. retries: how often a job is
    tried again when its worker or node dies, or when it ran out of memory. Records and outcomes must lie on a file
    system that all nodes share.
    """

    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    retries: int = 3
    _ray: Any = field(default=None, repr=False)

    def run(self, jobs: Sequence[Job], folder: Path, report: Report | None = None) -> dict[str, Outcome]:
        outcomes, todo = split_known(jobs, folder)
        total = len(outcomes) + len(todo)
        if not todo:
            return outcomes
        ray = self._connect()
        self._check_resources(ray)
        task = ray.remote(_on_worker).options(
            num_cpus=self.cpus, num_gpus=self.gpus, max_retries=self.retries, retry_exceptions=[Preempted, OutOfMemory]
        )
        env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        waiting = {task.remote(job, str(folder.absolute()), env): job for job in todo}
        head = Head(ray.get_runtime_context().gcs_address)
        try:
            while waiting:
                head.check()
                ready, _ = ray.wait(list(waiting), num_returns=1, timeout=1.0)
                for reference in ready:
                    job = waiting.pop(reference)
                    outcomes[job.key] = outcome = self._result(ray, reference, job)
                    if outcome.status == "done":
                        wait_until_visible(job, outcome, folder)
                    if report is not None:
                        report(len(outcomes), total, job, outcome)
        finally:
            for reference in waiting if not head.lost else ():  # a dead head would block
                with suppress(Exception):
                    ray.cancel(reference)
        return outcomes

    def close(self) -> None:
        """Leave the cluster; a local one ends."""
        if self._ray is not None:
            self._ray.shutdown()
            self._ray = None

    def _connect(self) -> Any:
        if self._ray is not None:
            return self._ray
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise InputError("--engine ray needs Ray: install clbench[cluster], or leave --engine out") from None
        reach(self.address)
        try:
            options: dict[str, Any] = {} if self.address else {"include_dashboard": False}
            ray.init(
                address=self.address or "local", ignore_reinit_error=True, log_to_driver=False,
                logging_level=logging.ERROR, **options,
            )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            where = f"the Ray cluster at {self.address}" if self.address else "Ray on this machine"
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"cannot reach {where}: {reason}; is it running (`ray status`)?") from error
        self._ray = ray
        return ray

    def _check_resources(self, ray: Any) -> None:
        """A job that fits nowhere would wait for ever."""
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(n.get("CPU", 0) >= self.cpus and n.get("GPU", 0) >= self.gpus for n in nodes):
            most = {kind: max((n.get(kind, 0) for n in nodes), default=0) for kind in ("CPU", "GPU")}
            raise InputError(
                f"no node of the cluster has {self.cpus:g} CPUs and {self.gpus:g} GPUs for a job (the largest has "
                f"{most['CPU']:g} and {most['GPU']:g}); lower --cpus-per-trial or --gpus-per-trial"
            )

    def _result(self, ray: Any, reference: Any, job: Job) -> Outcome:
        try:
            status, path, reason = ray.get(reference)
            return Outcome(status, path, reason)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, OutOfMemory):
                return Outcome("failed", reason=str(cause))
            if isinstance(cause, ClbenchError):
                raise named(cause, job) from None
            reason = f"{type(cause).__name__}: {cause}"
            raise RunFailed(f"{job.label}: {reason}; what is finished is kept, and the same command goes on") from error
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise RunFailed(
                f"{job.label}: its worker was lost {self.retries + 1} times, or the cluster is gone ({reason}); what "
                f"is finished is kept, and the same command goes on"
            ) from error


class Head:
    """The cluster's head, asked now and then whether it still listens: Ray itself notices after a minute only, and then
    ends the process without a word of ours."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.lost = False
        self._asked, self._silent = time.monotonic(), 0

    def check(self) -> None:
        """Raise RunFailed if it has not answered several times in a row."""
        if time.monotonic() - self._asked < HEAD_SECONDS:
            return
        self._asked = time.monotonic()
        try:
            reach(self.address)
            self._silent = 0
        except InputError:
            self._silent += 1
        if self._silent >= HEAD_TRIES:
            self.lost = True
            raise RunFailed(
                f"the head of the Ray cluster at {self.address} is gone; what is finished is kept: start the cluster "
                f"again, and the same command goes on"
            )


class Preempted(Exception):
    """A worker was asked to stop (a node is drained): the checkpoint is saved, another worker goes on."""


def _on_worker(job: Job, folder: str, env: Mapping[str, str]) -> tuple[str, str, str]:
    """What runs on a worker. Plain values come back, so that driver and worker need not agree on classes."""
    for name, value in env.items():
        os.environ.setdefault(name, value)
    try:
        outcome = run_job(job, Path(folder))
    except KeyboardInterrupt:
        raise Preempted(f"{job.label} was stopped") from None
    return outcome.status, outcome.path, outcome.reason


def reach(address: str | None) -> None:
    """Raise InputError if nothing answers at `HOST:PORT`; Ray itself would try for a minute."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"cannot reach a Ray cluster at {address}: {error.strerror or error}; start one with `ray start --head`, "
            f"or leave --address out to use this machine"
        ) from None


def wait_until_visible(job: Job, outcome: Outcome, folder: Path) -> None:
    """Raise InputError if what a worker wrote does not appear on this machine."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while find_outcome(job, folder) != outcome:
        if time.monotonic() > deadline:
            raise InputError(
                f"{job.label} has finished on another node, but its record cannot be seen in {job.where['out']}: "
                f"give an --out on a file system that all nodes share"
            )
        time.sleep(0.2)


def named(error: ClbenchError, job: Job) -> ClbenchError:
    """The same kind of error, with the job in front."""
    kind = InputError if isinstance(error, InputError) else RunFailed
    return kind(f"{job.label}: {error}")
