"""Studies and evaluations as tables: rows of text, then Markdown or CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clbench.metrics import Aggregate, find_metric
from clbench.protocol.analysis import expected_best, influence, score_of, trial_scores

__all__ = [
    "curve_rows", "evaluation_rows", "influence_rows", "markdown", "plain_text", "result_rows", "to_csv", "trial_rows",
]  # fmt: skip

Row = dict[str, str]


def number(value: float | None, metric: str) -> str:
    """Fractions in percent with one decimal."""
    if value is None:
        return "-"
    return f"{100 * value if find_metric(metric).unit == 'fraction' else value:.1f}"


def duration(seconds: float) -> str:
    """`12 s`, `3.5 min`, `2.1 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def spread(found: Aggregate | None, metric: str) -> str:
    """`mean ± sd`."""
    if found is None:
        return "-"
    sd = "" if found.std is None else f" ± {number(found.std, metric)}"
    return number(found.mean, metric) + sd


def result_rows(
    entries: Iterable[tuple[Mapping[str, Any], Mapping[str, Any] | None, Mapping[str, Any] | None]],
    metrics: Sequence[str],
    times: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
) -> list[Row]:
    """One row per method. entries: (study, two-phase evaluation, conventional evaluation), the latter two if there are.

    The last columns are the score of the study itself, as the conventional protocol would report it (tuned on the
    evaluation scenario, best score of its test rows), and the overestimate: conventional minus two-phase.
    """
    rows = []
    for study, evaluation, conventional in entries:
        row = {"method": study["method"]["id"], "trials": str(len(study["trials"])),
               "failed": str(sum(t["status"] == "failed" for t in study["trials"])),
               f"tuning {title(study['score'])}": number(study["best"]["score"], study["score"])}  # fmt: skip
        if evaluation is not None:
            finished = [run for run in evaluation["runs"] if run["status"] == "done"]
            row["seeds"] = f"{len(finished)} of {len(evaluation['seeds'])}"
            for metric in metrics:
                mark = " (in-scenario)" if evaluation["in_scenario"] else ""
                row[f"{title(metric)}{mark}"] = spread(score_of(evaluation, metric), metric)
        if conventional is not None and evaluation is not None:
            metric = study["score"]
            ours, theirs = score_of(evaluation, metric), score_of(conventional, metric)
            row["conventional"] = spread(theirs, metric)
            over = None if ours is None or theirs is None else theirs.mean - ours.mean
            row["overestimate"] = "-" if over is None else f"{100 * over:+.1f}"
        for part, cost in (times or {}).get(study["method"]["id"], {}).items():
            row[f"{part} runs"], row[f"{part} time"] = str(int(cost["runs"])), duration(cost["seconds"])
        rows.append(row)
    return rows


def trial_rows(study: Mapping[str, Any]) -> list[Row]:
    """One row per trial: its values, its score, and the score of each seed."""
    metric, best = study["score"], study["best"]["trial"]
    return [
        {
            "trial": f"{t['trial']}{' *' if t['trial'] == best else ''}",
            **{name: f"{t['values'][name]:.4g}" if isinstance(t["values"][name], float) else str(t["values"][name])
               for name in study["space"]},
            title(metric): number(t["score"], metric),
            "seeds": ", ".join(number(score, metric) for score in t["scores"].values()) or "-",
            "state": (t["reason"] or "failed") if t["status"] == "failed" else (
                "done" if t["first_tasks"] is None and len(t["scores"]) == len(study["seeds"]) else "left early"),
        }
        for t in study["trials"]
    ]  # fmt: skip


def curve_rows(study: Mapping[str, Any]) -> list[Row]:
    """Expected score of the best of R trials, R = 1 .. all."""
    metric = study["score"]
    sign = 1.0 if find_metric(metric).higher_is_better else -1.0
    return [
        {"best of": str(index + 1), f"expected {title(metric)}": number(sign * value, metric)}
        for index, value in enumerate(expected_best(trial_scores(study)))
    ]


def influence_rows(study: Mapping[str, Any]) -> list[Row]:
    """How much each hyperparameter mattered."""
    return [
        {
            "hyperparameter": each["name"],
            "variance explained": f"{100 * each['explained']:.0f} %",
            "rank correlation": "-" if each["rank_correlation"] is None else f"{each['rank_correlation']:+.2f}",
            "best values": str(each["best"]),
            "chosen": str(study["best"]["values"].get(each["name"], "-")),
        }
        for each in influence(study)
    ]


def title(metric: str) -> str:
    return find_metric(metric).title


def columns_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table; cells that a row lacks are `-`."""
    columns = columns_of(rows)
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(row.get(name, "-").replace("|", "\\|") for name in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """The same as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def plain_text(rows: Sequence[Row]) -> str:
    """Columns with two spaces between them, for a screen."""
    columns = columns_of(rows)
    cells = [columns, *([row.get(name, "-") for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def evaluation_rows(evaluation: Mapping[str, Any]) -> list[Row]:
    """One row per seed, then mean ± sd."""
    metrics = ("final_accuracy", "average_incremental_accuracy", "forgetting")
    rows = [
        {
            "seed": str(run["seed"]),
            **{title(m): number(run["metrics"].get(m), m) for m in metrics},
            "state": run["reason"] or run["status"],
        }
        for run in evaluation["runs"]
    ]
    return [*rows, {"seed": "mean ± sd", **{title(m): spread(score_of(evaluation, m), m) for m in metrics}}]
