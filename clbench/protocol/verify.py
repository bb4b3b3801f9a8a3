"""Compare a study's or evaluation's file with the run records it was made from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clbench.errors import ClbenchError
from clbench.protocol.space import OPTIONS
from clbench.store.record import RunRecord

__all__ = ["against_records"]


def against_records(path: Path, content: Mapping[str, Any]) -> list[str]:
    """What differs, one sentence each: a record that is missing, damaged, or says otherwise."""
    if content["kind"] == "evaluation":
        return _evaluation(path.parent, content)
    problems = []
    fingerprints = content["tuned_on"]["fingerprints"]
    for trial in content["trials"]:
        for rung in [trial, *trial.get("earlier", [])]:
            for seed, run in rung["runs"].items():
                where = f"trial {trial['trial']}, seed {seed}"
                print_ = fingerprints[seed] if rung["first_tasks"] is None else None
                score = {content["score"]: rung["scores"].get(seed)}
                problems += _run(path.parent / "trials" / run, where, int(seed), print_, trial["values"], score)
    return problems


def _evaluation(folder: Path, content: Mapping[str, Any]) -> list[str]:
    fingerprints = content["evaluated_on"]["fingerprints"]
    return [
        problem
        for run in content["runs"]
        if run["status"] == "done"
        for problem in _run(
            folder / run["run"], f"seed {run['seed']}", run["seed"], fingerprints[str(run["seed"])], content["values"],
            run["metrics"],
        )
    ]  # fmt: skip


def _run(
    path: Path, where: str, seed: int, fingerprint: str | None, values: Mapping[str, Any], metrics: Mapping[str, Any]
) -> list[str]:
    record = RunRecord(path)
    try:
        spec, summary, problems = record.read_spec(), record.read_summary(), record.damage()
    except ClbenchError as error:
        return [f"{where}: {error}"]
    if spec.order_seed != seed:
        problems.append(f"{path} was run with order seed {spec.order_seed}")
    if fingerprint is not None and spec.scenario_fingerprint != fingerprint:
        problems.append(f"{path} was run on another table of {spec.scenario}")
    for name, value in values.items():
        found = getattr(spec, name) if name in OPTIONS else spec.hyperparameters[name].value
        if found != value:
            problems.append(f"{path} was run with {name}={found}, not {value}")
    problems += [
        f"{path} says {name} = {summary.get(name)}, the file says {value}"
        for name, value in metrics.items()
        if summary.get(name) != value
    ]
    return [f"{where}: {problem}" for problem in problems]
