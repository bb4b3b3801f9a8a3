"""Run records to MLflow: one parent per (method, scenario, options), one run inside it per seed.

Logged once: a run is known by its tag `clbench.run`. A record that was to be tracked and could not be says so in its
file `tracking.json`, and `clbench sync` logs it later; training never waits for a server.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clbench.atomic import atomic_write_bytes
from clbench.errors import InputError
from clbench.metrics import Curve
from clbench.store.record import RunRecord, run_id
from clbench.store.schema import Spec
from clbench.tracking.client import connect, experiment_id, find_run, log_values, reason_of

__all__ = ["EXPERIMENT", "Synced", "sampled_curve", "store_uri", "sync_runs", "track_run"]

EXPERIMENT = "clbench"
MARK = "tracking.json"
CURVE_POINTS = 200
ARTIFACTS = (
    "spec.json", "env.json", "summary.json", "matrix.csv", "curve.parquet", "losses.parquet", "predictions.parquet",
    "curve.png",
)  # fmt: skip
SECONDS, TRIES = "10", "1"  # a server that is down is noticed soon


class Synced(NamedTuple):
    """Folders of records logged now, found there already, and (folder, reason) of those that failed."""

    logged: list[Path]
    known: list[Path]
    failed: list[tuple[Path, str]]


def store_uri(text: str, runs: Path) -> str:
    """What `--track` means: `local` is a sqlite file among the records, anything else an MLflow URI."""
    return f"sqlite:///{(runs / 'mlflow.db').absolute()}" if text == "local" else text


def track_run(path: Path, uri: str) -> bool:
    """Log the finished record at `path` to the MLflow store at `uri`. False, with a warning on stderr, if that fails:
    the record is then marked for `sync_runs`."""
    mark(path, uri, "pending")
    try:
        log_record(path, uri)
    except Exception as error:  # whatever a server does, the run is on disk
        mark(path, uri, "pending", reason_of(error))
        print(
            f"warning: {path} is not logged to MLflow at {uri}: {reason_of(error)}; nothing is lost, "
            f"`clbench sync --runs DIR` logs it later",
            file=sys.stderr,
        )
        return False
    mark(path, uri, "logged")
    return True


def sync_runs(folder: Path, uri: str | None = None) -> Synced:
    """Log the records below `folder` that were to be tracked and are not, each to the store it was meant for; with
    `uri` all finished records, to that one.

    Raises InputError if there is no such folder. What fails is named and does not stop the rest.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give the one that holds the run records with --runs")
    out = Synced([], [], [])
    for path in sorted(done.parent for done in folder.rglob("DONE")):
        target = uri
        try:
            wanted = read_mark(path)
            if target is None:
                if wanted is None or wanted["state"] == "logged":
                    continue
                target = wanted["uri"]
            new = log_record(path, target)
            mark(path, target, "logged")
            (out.logged if new else out.known).append(path)
        except Exception as error:  # one damaged record or one dead server is no reason to leave the others out
            out.failed.append((path, reason_of(error)))
    return out


def log_record(path: Path, uri: str) -> bool:
    """Copy one record to MLflow; False if it is there already. An interrupted copy is thrown away and made anew."""
    for name, value in (("MLFLOW_HTTP_REQUEST_TIMEOUT", SECONDS), ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", TRIES)):
        os.environ.setdefault(name, value)
    record = RunRecord(path)
    spec, summary = record.read_spec(), record.read_summary()
    client = connect(uri)
    experiment = experiment_id(client, EXPERIMENT, uri)
    name = f"{path.name}/{summary['weights_sha256'][:12]}"
    if find_run(client, experiment, "clbench.complete", name):
        return False
    half = find_run(client, experiment, "clbench.run", name)
    if half is not None:
        client.delete_run(half)
    parent = parent_run(client, experiment, spec)
    tags = {
        "mlflow.parentRunId": parent, "clbench.run": name, "clbench.run_id": path.name,
        "clbench.weights": summary["weights_sha256"], "clbench.scenario": spec.scenario, "clbench.method": spec.method,
        "clbench.fingerprint": spec.scenario_fingerprint, "clbench.contaminated": spec.contaminated or "",
    }  # fmt: skip
    run = client.create_run(experiment, run_name=f"seed {spec.seed}, order {spec.order_seed}", tags=tags).info.run_id
    params = {
        **options_of(spec), "seed": spec.seed, "order_seed": spec.order_seed,
        **{f"source.{key}": entry.source for key, entry in spec.hyperparameters.items()},
    }  # fmt: skip
    log_values(client, run, params, list(metrics_of(summary)) + list(sampled_curve(record.read_curve())))
    for name_ in ARTIFACTS:
        if (path / name_).exists():
            client.log_artifact(run, str(path / name_))
    client.set_tag(run, "clbench.complete", name)  # last: an interrupted logging is done again
    client.set_terminated(run)
    return True


def parent_run(client: Any, experiment: str, spec: Spec) -> str:
    """The run that holds all seeds of a method, a scenario and one set of options."""
    key = run_id({"method": spec.method, "file": spec.method_file, "scenario": spec.scenario, **options_of(spec)})
    found = find_run(client, experiment, "clbench.seeds_of", key)
    if found is not None:
        return found
    tags = {"clbench.seeds_of": key, "clbench.scenario": spec.scenario, "clbench.method": spec.method}
    run = str(client.create_run(experiment, run_name=f"{spec.method} on {spec.scenario}", tags=tags).info.run_id)
    log_values(client, run, options_of(spec), {})
    client.set_terminated(run)
    return run


def options_of(spec: Spec) -> dict[str, Any]:
    """What seeds of one run have in common, by name."""
    plain = {
        key: getattr(spec, key)
        for key in (
            "backbone", "batch_size", "epochs", "updates_per_batch", "train_view", "test_view", "mask", "precision",
            "eval_every", "eval_per_group", "setting", "weights", "device_type",
        )
    }  # fmt: skip
    params = {f"scenario.{key}": value for key, value in spec.scenario_params.items()}
    return plain | params | {key: entry.value for key, entry in spec.hyperparameters.items()}


def metrics_of(summary: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float, int]]:
    """Every number of a summary, nested names joined by a dot."""
    for key, value in summary.items():
        if isinstance(value, Mapping):
            yield from metrics_of(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value):
            yield f"{prefix}{key}", float(value), 0


def sampled_curve(curve: Curve, points: int = CURVE_POINTS) -> Iterator[tuple[str, float, int]]:
    """(name, accuracy, step) of the mean and of every group, at most about `points` each: of every stretch of
    evaluations its lowest and its highest, so that a gap of one step is not lost."""
    steps = curve.steps
    series = {"curve.mean": curve.mean_accuracy}
    if len(curve.groups) <= 50:
        series |= {f"curve.{clean(name)}": curve.accuracy[:, index] for index, name in enumerate(curve.groups)}
    for name, values in series.items():
        measured = np.flatnonzero(np.isfinite(values))
        for index in extremes(values[measured], points):
            at = measured[index]
            yield name, float(values[at]), int(steps[at])


def extremes(values: np.ndarray, points: int) -> Sequence[int]:
    """Indices, in order, of the lowest and highest value of each of `points` / 2 equal stretches, and of the ends."""
    if len(values) <= points:
        return range(len(values))
    edges = np.linspace(0, len(values), max(points // 2, 1) + 1).astype(int)
    chosen = {0, len(values) - 1}
    for low, high in pairwise(edges):
        chosen |= {low + int(values[low:high].argmin()), low + int(values[low:high].argmax())}
    return sorted(chosen)


def clean(name: str) -> str:
    """Group name in the letters that MLflow takes for metrics."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in name)


def mark(path: Path, uri: str, state: str, reason: str = "") -> None:
    """Note in the record where it was to be tracked; not one of the files that DONE vouches for."""
    atomic_write_bytes(
        path / MARK, (json.dumps({"uri": uri, "state": state, "reason": reason}, indent=1) + "\n").encode()
    )


def read_mark(path: Path) -> dict[str, str] | None:
    try:
        found = json.loads((path / MARK).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path / MARK} is damaged ({reason_of(error)}); delete it, or give --track URI") from error
    if not isinstance(found, dict) or not {"uri", "state"} <= found.keys():
        raise InputError(f"{path / MARK} is damaged (no uri, no state); delete it, or give --track URI")
    return found
