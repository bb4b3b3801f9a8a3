"""Any grid of methods x scenarios x seeds, through the same engines as studies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clbench.errors import InputError
from clbench.metrics import aggregate
from clbench.protocol.engines import Engine, Report
from clbench.protocol.jobs import Job, Outcome, summary_of
from clbench.protocol.study import checked, full_path
from clbench.protocol.tables import Row, spread, title
from clbench.report.table import main_metrics

__all__ = ["Cell", "sweep", "sweep_rows"]


@dataclass(frozen=True)
class Cell:
    """One method on one scenario. outcomes: per seed. refused: why it could not be run at all, else empty."""

    method: str
    scenario: str
    outcomes: Mapping[int, tuple[Job, Outcome]]
    refused: str = ""


def sweep(
    methods: Sequence[str],
    scenarios: Sequence[str],
    seeds: Sequence[int],
    engine: Engine,
    *,
    fixed: Mapping[str, Mapping[str, Any]],
    where: Mapping[str, Any],
    out: Path,
    report: Report | None = None,
) -> list[Cell]:
    """Run the grid; records go to `out` as `clbench run` would write them, and finished ones are found there.

    fixed: per method, fields of `RunSpec`. A pair that cannot be (a method in a setting that it does not support) is
    refused before anything runs, with its reason, and the others run. Raises InputError if that is true of all.
    """
    from clbench.learner.resolve import check_setting
    from clbench.methods import registry
    from clbench.protocol.pairs import open_phase

    where = {**where, "out": str(out.absolute())}
    cells: list[Cell] = []
    jobs: list[Job] = []
    for scenario in scenarios:
        for method in methods:
            options = fixed[method]
            found = registry.find(method)
            params = options.get("scenario_params", {})
            phase = open_phase(scenario, params, seeds[:1], where.get("data", ()))
            try:
                check_setting(found, phase.any)
            except InputError as error:
                cells.append(Cell(found.id, phase.id, {}, str(error)))
                continue
            own = {}
            for seed in seeds:
                name = str(found.path.resolve()) if found.digest and found.path else found.id
                spec = checked({**options, "method": name, "scenario": full_path(scenario), "seed": seed})
                own[seed] = Job(spec, where, label=f"{found.id} on {phase.id}, seed {seed}")
            jobs += own.values()
            cells.append(Cell(found.id, phase.id, {seed: (job, Outcome("failed")) for seed, job in own.items()}))
    if not jobs:
        raise InputError(cells[0].refused if cells else "nothing to run: give --method, --scenario and --seeds")
    outcomes = engine.run(jobs, out / ".jobs", report)
    return [
        replace(cell, outcomes={seed: (job, outcomes[job.key]) for seed, (job, _) in cell.outcomes.items()})
        for cell in cells
    ]


def sweep_rows(cells: Sequence[Cell]) -> list[Row]:
    """One row per cell: mean ± sd of the main metrics over its seeds."""
    rows = []
    for cell in cells:
        summaries = [summary_of(*pair) for pair in cell.outcomes.values() if pair[1].status == "done"]
        failed = [outcome.reason for _, outcome in cell.outcomes.values() if outcome.status == "failed"]
        found = aggregate({key: s.get(key) for key in main_metrics(summaries)} for s in summaries)
        row = {"scenario": cell.scenario, "method": cell.method, "seeds": str(len(summaries))}
        row |= {title(key): spread(found.get(key), key) for key in (main_metrics(summaries) if summaries else ())}
        row["note"] = cell.refused or (f"{len(failed)} failed: {failed[0]}" if failed else "")
        rows.append(row)
    return rows
