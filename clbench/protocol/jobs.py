"""One run as plain data: what it is called, running it once, and what came of it.

A job's outcome is a file `<jobs>/<key>.json`, written when it is known and never before: whoever asks again, after
whatever was killed, finds it. In between, the run's own record and checkpoints hold what has been done; a lock beside
the outcome keeps two processes from doing it at once, and dies with its process.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from clbench.atomic import atomic_write_bytes, explain_os_error
from clbench.errors import InputError, RunFailed
from clbench.store.record import RunRecord, run_id

__all__ = ["Job", "OutOfMemory", "Outcome", "find_outcome", "run_job"]

LOCK_POLL_SECONDS = 0.2


class OutOfMemory(RunFailed):
    """A job needed more memory than there was: perhaps because of its neighbours, so it is worth another try."""


@dataclass(frozen=True)
class Job:
    """spec: fields of `RunSpec` as JSON gives them, without those that only say where and how to run. where: those:
    `out`, `data`, `device`, `threads`, `weights`, `checkpoint_every`. sources, option_sources: what the
    record shall say of where hyperparameters and run options come from, by name. label: for people.
    """

    spec: Mapping[str, Any]
    where: Mapping[str, Any]
    sources: Mapping[str, str] = field(default_factory=dict)
    option_sources: Mapping[str, str] = field(default_factory=dict)
    label: str = ""

    @property
    def key(self) -> str:
        """Names the job: the same for the same spec and record sources, wherever it runs."""
        return run_id({"spec": dict(self.spec), "sources": [dict(self.sources), dict(self.option_sources)]})


@dataclass(frozen=True)
class Outcome:
    """done: the record at `path`, relative to the jobs' `out`. failed: the run broke for the reason given, and would
    break again."""

    status: Literal["done", "failed"]
    path: str = ""
    reason: str = ""


def find_outcome(job: Job, jobs: Path) -> Outcome | None:
    """What is known of a job; None if it has not been run, or if its record has gone since."""
    path = jobs / f"{job.key}.json"
    try:
        outcome = Outcome(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise explain_os_error(error, path, "read") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it, and the run is looked up again") from None
    if outcome.status == "done" and not (Path(job.where["out"]) / outcome.path / "DONE").exists():
        return None
    return outcome


def run_job(job: Job, jobs: Path) -> Outcome:
    """Run a job, or finish it, or show what came of it. The only place where a run of a study is run.

    Raises InputError for what can't be used, RunFailed for a full disk, OutOfMemory, KeyboardInterrupt when stopped
    (checkpoint saved): all of these leave no outcome behind, so the job is run again.
    """
    with job_lock(jobs / f".{job.key}.lock"):
        known = find_outcome(job, jobs)
        if known is not None:
            return known
        outcome = attempt(job)
        atomic_write_bytes(jobs / f"{job.key}.json", (json.dumps(asdict(outcome), indent=1) + "\n").encode())
        return outcome


def attempt(job: Job) -> Outcome:
    import torch

    from clbench.learner.resolve import resolve
    from clbench.learner.run import run
    from clbench.learner.spec import RunSpec

    spec = RunSpec.model_validate({**job.spec, **job.where})
    try:
        resolved = resolve(spec)
        mark_sources(resolved.document, job)
        result = run(resolved)
    except RunFailed as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            raise OutOfMemory(str(error)) from error
        if isinstance(error.__cause__, OSError):  # a full disk says nothing about the trial
            raise
        return Outcome("failed", reason=str(error))
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"out of memory on {spec.device}: {error}") from error
    return Outcome("done", path=str(result.path.relative_to(spec.out)))


def mark_sources(document: dict[str, Any], job: Job) -> None:
    """Write into a record's document where values come from."""
    entries = document["hyperparameters"]
    entries |= {name: {**entries[name], "source": source} for name, source in job.sources.items()}
    document["sources"] |= job.option_sources


@contextlib.contextmanager
def job_lock(path: Path) -> Iterator[None]:
    """Wait for the lock file at `path`; it is freed when its process ends, however that ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise explain_os_error(error, path) from error
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(LOCK_POLL_SECONDS)
        yield
    finally:
        os.close(handle)


def summary_of(job: Job, outcome: Outcome) -> dict[str, Any]:
    """The summary of a finished job's record."""
    return record_of(job, outcome).read_summary()


def record_of(job: Job, outcome: Outcome) -> RunRecord:
    return RunRecord(Path(job.where["out"]) / outcome.path)
