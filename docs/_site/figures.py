"""Numbers for the pages: what is committed under results/, and what was published."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from clbench.metrics import aggregate
from clbench.report.published import Published, find

__all__ = ["Measured", "measured", "published_rows", "results_rows"]

RESULTS = Path(__file__).parents[2] / "results"
METRICS = ("final_accuracy", "average_incremental_accuracy", "forgetting", "min_accuracy", "transfer", "avg", "last")
TITLES = {
    "final_accuracy": "final accuracy", "average_incremental_accuracy": "average incremental",
    "forgetting": "forgetting", "min_accuracy": "min-ACC", "transfer": "Transfer", "avg": "Avg", "last": "Last",
}  # fmt: skip


class Measured(NamedTuple):
    """Committed runs that differ in their seeds alone. folder: of results/, which names command and conditions."""

    folder: str
    scenario: str
    method: str
    changed: str
    backbone: str
    summaries: tuple[Mapping[str, Any], ...]


@cache
def measured() -> tuple[Measured, ...]:
    """All committed runs, grouped."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*/runs/**/summary.json")):
        spec = json.loads(path.with_name("spec.json").read_text())
        given = [f"{k}={v['value']}" for k, v in spec["hyperparameters"].items() if v["source"] == "--set"]
        shown = ("per_class", "test_per_class", "tasks", "setting", "shape")
        given += [f"{k}={spec['scenario_params'][k]}" for k in shown if spec["scenario_params"].get(k) is not None]
        key = (path.relative_to(RESULTS).parts[0], spec["scenario"], spec["method"], ", ".join(given), spec["backbone"])
        groups.setdefault(key, []).append(json.loads(path.read_text()))
    return tuple(Measured(*key, tuple(summaries)) for key, summaries in groups.items())


def results_rows(rows: list[Measured], first: str) -> Iterator[str]:
    """A Markdown table of measured runs. first: `scenario` or `method`, whichever the page is not about."""
    keys = [key for key in METRICS if any(s.get(key) is not None for row in rows for s in row.summaries)]
    yield f"| {first} | changed | backbone | seeds | " + " | ".join(TITLES[key] for key in keys) + " | from |"
    yield "|---" * (5 + len(keys)) + "|"
    for row in rows:
        found = aggregate([{key: summary.get(key) for key in keys} for summary in row.summaries])
        cells = []
        for key in keys:
            if key not in found:
                cells.append("–")
                continue
            spread = found[key].std
            cells.append(f"{100 * found[key].mean:.1f}" + (f" ± {100 * spread:.1f}" if spread is not None else ""))
        name = getattr(row, first)
        link = f"[{name}](../{first}s/{name.partition('@')[0]}.md)"
        where = f"[{row.folder}](../results/{row.folder}.md)"
        what = [link, row.changed or "–", row.backbone, str(len(row.summaries))]
        yield f"| {' | '.join([*what, *cells, where])} |"


def published_rows(**what: str) -> Iterator[str]:
    """A Markdown table of published numbers, empty if there are none."""
    numbers: list[Published] = find(**what)
    if not numbers:
        return
    other = "scenario" if "method" in what else "method"
    yield f"| {other} | setting | metric | published | status | source |"
    yield "|---|---|---|---|---|---|"
    for number in numbers:
        setting = ", ".join(f"{key} {value}" for key, value in number.setting.items()) or "–"
        value = f"{100 * number.value:.1f}" + (f" ± {100 * number.spread:.1f}" if number.spread is not None else "")
        yield (
            f"| {getattr(number, other)} | {setting} | {TITLES.get(number.metric, number.metric)} | {value} | "
            f"{number.status} | {number.source} |"
        )
