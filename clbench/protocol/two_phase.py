"""The whole protocol: tune every method on D_HT, freeze, score on D_E; if asked, the conventional one beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clbench.atomic import atomic_write_bytes
from clbench.protocol import analysis, tables
from clbench.protocol.engines import Engine, Report
from clbench.protocol.evaluation import evaluate
from clbench.protocol.pairs import compare, open_phase
from clbench.protocol.study import StudyPlan, check_study, load_study, prepare, tune

__all__ = ["MethodResult", "Target", "evaluate_frozen", "run_protocol", "write_report"]

METRICS = ("final_accuracy", "average_incremental_accuracy", "forgetting")


@dataclass(frozen=True)
class Target:
    """D_E: scenario, its parameters, evaluation seeds. in_scenario: it may share classes or images with D_HT."""

    scenario: str
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    params: Mapping[str, Any] | None = None
    in_scenario: bool = False


@dataclass(frozen=True)
class MethodResult:
    """folder: of the study. conventional: (study, evaluation) tuned on D_E itself by its test rows, if asked for."""

    folder: Path
    study: dict[str, Any]
    evaluation: dict[str, Any] | None = None
    conventional: tuple[dict[str, Any], dict[str, Any]] | None = None
    conventional_folder: Path | None = None


def run_protocol(
    plans: Sequence[StudyPlan],
    target: Target | None,
    engine: Engine,
    *,
    conventional: bool = False,
    report: Report | None = None,
) -> list[MethodResult]:
    """Studies of all plans, which share a scenario, then their evaluations on `target`.

    What can be wrong is found first: every plan is prepared, and the two scenarios are compared and closed again. While
    trials run D_E is not built; evaluation begins when all studies are frozen.
    """
    prepared = [prepare(plan) for plan in plans]
    if target is not None and not target.in_scenario:
        for first in {each.phase.id: each for each in prepared}.values():
            other = open_phase(target.scenario, target.params or {}, target.seeds, first.plan.where.get("data", ()))
            compare(first.phase, other).require_disjoint(first.phase.id, other.id)
            del other
    results = [MethodResult(each.folder, tune(each, engine, report)) for each in prepared]
    if target is None:
        return results
    results = [
        replace(result, evaluation=evaluate_plan(each.file, each.plan, target, engine, report))
        for each, result in zip(prepared, results, strict=True)
    ]
    if not conventional:
        return results
    return [
        add_conventional(result, each.plan, target, engine, report)
        for each, result in zip(prepared, results, strict=True)
    ]


def evaluate_plan(file: Path, plan: StudyPlan, target: Target, engine: Engine, report: Report | None) -> dict[str, Any]:
    """Evaluate the study that a plan has led to."""
    return evaluate(
        file, target.scenario, engine, seeds=target.seeds, params=target.params, where=plan.where, method=plan.method,
        tune_scenario=plan.scenario, in_scenario=target.in_scenario, report=report,
    )  # fmt: skip


def add_conventional(
    result: MethodResult, plan: StudyPlan, target: Target, engine: Engine, report: Report | None
) -> MethodResult:
    """The same study on D_E itself, scored on its test rows: how results are reported conventionally."""
    there = replace(plan, scenario=target.scenario, params=dict(target.params or {}), score_on="test")
    prepared = prepare(there)
    study = tune(prepared, engine, report)
    itself = replace(target, in_scenario=True)
    evaluation = evaluate_plan(prepared.file, there, itself, engine, report)
    return replace(result, conventional=(study, evaluation), conventional_folder=prepared.folder)


def evaluate_frozen(
    files: Sequence[Path], target: Target, engine: Engine, where: Mapping[str, Any], report: Report | None = None
) -> list[MethodResult]:
    """Evaluate frozen studies, without tuning anything."""
    studies = [load_study(file) for file in files]
    for study, file in zip(studies, files, strict=True):
        check_study(study, file, None, where.get("data", ()))
    return [
        MethodResult(
            file.parent,
            study,
            evaluate(
                file, target.scenario, engine, seeds=target.seeds, params=target.params, where=where,
                in_scenario=target.in_scenario, report=report,
            ),
        )
        for study, file in zip(studies, files, strict=True)
    ]  # fmt: skip


def write_report(results: Sequence[MethodResult], folder: Path) -> Path:
    """`report.md`, `results.csv`, and per method `<method>-trials.csv`, `<method>-best-of.csv`; returns the first."""
    rows = rows_of(results)
    first = results[0]
    tuned = first.study["tuned_on"]
    lines = [f"# Tuned on {tuned['scenario']}" + (
        f", evaluated on {first.evaluation['evaluated_on']['scenario']}" if first.evaluation else ""), ""]  # fmt: skip
    lines += [tables.markdown(rows), ""]
    lines += [f"- {note}" for note in notes(results)]
    for result in results:
        name = result.study["method"]["id"]
        lines += ["", f"## {name}", "", f"study `{result.study['study']}`, signature `{result.study['signature']}`", ""]
        if result.study["space"]:
            lines += [tables.markdown(tables.influence_rows(result.study)), ""]
            lines += [tables.markdown(tables.trial_rows(result.study)), ""]
            lines += [tables.markdown(tables.curve_rows(result.study))]
            write(folder / f"{name}-trials.csv", tables.to_csv(tables.trial_rows(result.study)))
            write(folder / f"{name}-best-of.csv", tables.to_csv(tables.curve_rows(result.study)))
    write(folder / "results.csv", tables.to_csv(rows))
    write(folder / "report.md", "\n".join(lines) + "\n")
    return folder / "report.md"


def rows_of(results: Sequence[MethodResult]) -> list[tables.Row]:
    """The main table, with what was spent."""
    times = {}
    for result in results:
        cost: dict[str, Mapping[str, float]] = dict(analysis.spent(result.folder, result.study, result.evaluation))
        if result.conventional is not None and result.conventional_folder is not None:
            again = analysis.spent(result.conventional_folder, result.conventional[0])
            cost["conventional tuning"] = again["tuning"]
        times[result.study["method"]["id"]] = cost
    entries = [(r.study, r.evaluation, r.conventional[1] if r.conventional else None) for r in results]
    return tables.result_rows(entries, METRICS, times)


def notes(results: Sequence[MethodResult]) -> list[str]:
    """What a reader of the table must know."""
    study, evaluation = results[0].study, results[0].evaluation
    tuned = study["tuned_on"]
    scored = (
        f"{100 * tuned['val_share']:g} % of each class's training rows, kept out for validation"
        if tuned["score_on"] == "validation"
        else "the TEST rows of the tuning scenario (the official code's choice)"
    )
    seeds, kinds = len(study["seeds"]), study["search"]["kind"]
    out = [
        f"Trials were scored on {scored}; {seeds} seeds per trial, search `{kinds}`, best mean chosen.",
        "Accuracies in percent; ± is the standard deviation over evaluation seeds (class orders), not over trials.",
    ]
    if evaluation is not None:
        shared = evaluation["overlap"]
        if evaluation["in_scenario"]:
            out.append("IN-SCENARIO: the two scenarios share classes or images; this is no two-phase result.")
        else:
            images = shared["shared_images"]
            found = "images of different sizes, not compared" if images is None else f"{images} shared images"
            out.append(f"The two scenarios share no class; {found} of {shared['evaluation_images']}.")
        out += [f"The configuration differs: {text}." for text in shared["configuration_differs"]]
    if any(result.conventional for result in results):
        out.append(
            "Conventional: tuned on the evaluation scenario by its test rows, then scored there. Overestimate: "
            "conventional minus two-phase, in points."
        )
    if any(len(result.study["code"]) > 1 for result in results):
        out.append("The code changed while a study ran: see `code` in its file.")
    return out


def write(path: Path, text: str) -> None:
    atomic_write_bytes(path, text.encode())
