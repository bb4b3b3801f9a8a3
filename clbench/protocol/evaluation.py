"""Score a frozen choice on another scenario. The only way in which a record comes to say `tuned on X`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from clbench.errors import InputError
from clbench.protocol.engines import Engine, Report
from clbench.protocol.jobs import Job, summary_of
from clbench.protocol.pairs import Overlap, Phase, compare, open_phase
from clbench.protocol.signed import read_signed, write_signed
from clbench.protocol.space import split_values
from clbench.protocol.study import (
    WHERE,
    check_method,
    check_study,
    checked,
    code_of,
    file_digest,
    full_path,
    load_study,
)
from clbench.store.record import run_id

__all__ = ["evaluate", "load_evaluation"]

VERSION = 1


def evaluate(
    study_file: Path,
    scenario: str,
    engine: Engine,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    params: Mapping[str, Any] | None = None,
    where: Mapping[str, Any] | None = None,
    method: str | None = None,
    tune_scenario: str | None = None,
    in_scenario: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:
    """Run the frozen choice of `study_file` on `scenario` for all seeds; returns the content of the evaluation's file.

    method, tune_scenario: paths, where the study's are files of the user's own. where: as in `StudyPlan`.
    in_scenario: allow a scenario that shares classes or images with the one tuned on; the records and the file say so.

    Raises InputError for a study file that was changed or does not fit the data or the method here, and for
    overlapping scenarios.
    """
    from clbench.methods import registry

    where = dict(where or {})
    study = load_study(study_file)
    data = where.get("data", ())
    found = registry.find(method or study["method"]["id"])
    check_method(study, study_file, found)
    if file_digest(where.get("weights")) != study["weights_sha256"]:
        raise InputError(f"{study_file} was tuned with other --weights than are given here; give the same file")
    tuned = check_study(study, study_file, tune_scenario, data)
    phase = open_phase(scenario, params or {}, seeds, data)
    overlap = compare(tuned, phase)
    if not in_scenario:
        overlap.require_disjoint(tuned.id, phase.id)
    folder = study_file.parent / "evaluation"
    where["out"] = str(folder.absolute())
    name = str(found.path.resolve()) if found.digest and found.path else found.id
    source = source_of(study, tuned, overlap)
    jobs = {
        seed: replace(
            evaluation_job(study, name, scenario, params or {}, phase, seed, source, where),
            label=f"{found.id} on {phase.id}, tuned on {tuned.id}, seed {seed}",
        )
        for seed in seeds
    }
    outcomes = engine.run(list(jobs.values()), study_file.parent / "jobs", report)
    runs, done = [], []
    for seed, job in jobs.items():
        outcome = outcomes[job.key]
        summary = summary_of(job, outcome) if outcome.status == "done" else {}
        if summary:
            done.append((job, outcome))
        runs.append({"seed": seed, "status": outcome.status, "reason": outcome.reason, "run": outcome.path,
                     "metrics": metrics_of(summary)})  # fmt: skip
    content = {
        "kind": "evaluation",
        "version": VERSION,
        "study": study["study"],
        "study_signature": study["signature"],
        "method": study["method"],
        "tuned_on": tuned.id,
        "evaluated_on": phase.describe(),
        "in_scenario": not overlap.disjoint,
        "overlap": overlap.describe(),
        "values": study["best"]["values"],
        "seeds": list(seeds),
        "runs": runs,
        "code": code_of(done),
    }
    key = run_id({"on": phase.describe(), "seeds": list(seeds)})
    return write_signed(folder / f"{phase.preset.name}-{key}.json", content)


def load_evaluation(path: Path) -> dict[str, Any]:
    """Read an evaluation's file. Raises InputError if it is missing, damaged, or has been changed."""
    return read_signed(path, "evaluation")


def source_of(study: Mapping[str, Any], tuned: Phase, overlap: Overlap) -> str:
    """What records say of the searched values."""
    itself = "" if overlap.disjoint else ", in-scenario: it shares classes or images with this one"
    scored = "" if study["tuned_on"]["score_on"] == "validation" else ", scored on its test rows"
    return f"tuned on {tuned.id} (study {study['signature'][:12]}{scored}{itself})"


def evaluation_job(
    study: Mapping[str, Any], method: str, scenario: str, params: Mapping[str, Any], phase: Phase, seed: int,
    source: str, where: Mapping[str, Any],
) -> Job:  # fmt: skip
    """The frozen trial on the evaluation scenario: every hyperparameter and option as it was, whatever recipe the
    evaluation scenario has."""
    kept = study["best"]["frozen"]
    options = {name: entry["value"] for name, entry in kept["options"].items()}
    if phase.any.online:
        if options["epochs"] != 1:
            raise InputError(f"{phase.id} is online, but the study was tuned with {options['epochs']} epochs")
        options.pop("epochs")
    fixed = {name: value for name, value in study["fixed"].items() if name not in WHERE}
    spec = {
        **fixed, **options,
        "method": method,
        "scenario": full_path(scenario),
        "seed": seed if study["run_seed"] is None else study["run_seed"],
        "order_seed": seed,
        "set": {name: entry["value"] for name, entry in kept["hyperparameters"].items()},
        "scenario_params": dict(params),
    }  # fmt: skip
    searched, chosen = split_values(study["space"])
    return Job(
        checked(spec),
        where,
        {name: source if name in searched else entry["source"] for name, entry in kept["hyperparameters"].items()},
        {name: source if name in chosen else entry["source"] for name, entry in kept["options"].items()},
    )


def metrics_of(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """The registered metrics of a summary, and what the run cost."""
    from clbench.metrics import list_metrics

    if not summary:
        return {}
    return {key: summary.get(key) for metric in list_metrics() for key in metric.keys}
