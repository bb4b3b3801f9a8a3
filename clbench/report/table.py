"""The final table of a command: a row per run, then mean, spread and 95 % interval over the seeds.

Fractions are shown in percent with one decimal, recovery in steps. Narrow enough for a terminal of 80 columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clbench.metrics import Metric, aggregate, find_metric, list_metrics

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["level_rows", "main_metrics", "result_rows", "results_table", "table_note"]

Row = dict[str, str]
NOTE = "accuracies in percent, recovery in steps"
SAMPLING = "; subset ±: sampling error of the evaluation subsets"
NEVER = "; * without tasks that never recovered"
SPARSE = "; minima and gaps as seen by {} evaluations in {} steps: --eval-every 1 sees all"


def main_metrics(summaries: Sequence[Mapping[str, Any]] = (), *, multi_domain: bool = False) -> list[str]:
    """Keys of the metrics that a table shows unless told otherwise.

    Where the protocol of the runs has measures of its own, those come first and take the place of their relatives:
    A_AUC, A_last and F_last (evaluated by samples), or Transfer, Avg and Last (`multi_domain`: one data set per task).
    """
    keys = [metric.key for metric in list_metrics() if metric.main]
    if multi_domain:
        keys = ["transfer", "avg", "last", "forgetting", "min_accuracy", "stability_gap"]
    elif any(summary.get("f_last") is not None for summary in summaries):
        keys = ["a_auc", "a_last", "f_last", *(key for key in keys if key not in ("final_accuracy", "forgetting"))]
    else:
        return keys
    return [key for key in keys if any(summary.get(key) is not None for summary in summaries)]


def level_rows(seeds: Sequence[int], summaries: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row per run and label level, in percent; none where there is one level only."""
    titles = {"a_auc": "A_AUC", "a_avg": "A_avg", "a_last": "A_last", "f_last": "F_last"}
    metric = find_metric("a_auc")
    return [
        {
            "run": f"seed {seed}",
            "level": str(level["level"]),
            **{title: number(metric, level[key]) for key, title in titles.items()},
        }
        for seed, summary in zip(seeds, summaries, strict=True)
        for level in summary.get("levels", ())
    ]


def result_rows(
    seeds: Sequence[int], summaries: Sequence[Mapping[str, Any]], metrics: Iterable[str] | None = None
) -> list[Row]:
    """The table as plain rows: `run` and the title of each metric -> text, `-` where a metric is not defined.

    summaries: the flat summaries of finished runs, one per seed.  metrics: keys; those of `main_metrics` by default.
    Rows: one per seed; with several also `mean`, `std` (n - 1) and `95 % ±` (half width of the t interval of the mean);
    then `subset ±`, the largest sampling error of any of the runs. Raises InputError for an unknown metric.
    """
    chosen = [find_metric(key) for key in (main_metrics(summaries) if metrics is None else metrics)]
    rows = [
        {"run": f"seed {seed}", **{metric.title: of_run(metric, summary) for metric in chosen}}
        for seed, summary in zip(seeds, summaries, strict=True)
    ]
    found = aggregate({metric.key: summary.get(metric.key) for metric in chosen} for summary in summaries)
    if len(rows) > 1:
        for name, field in (("mean", "mean"), ("std", "std"), ("95 % ±", "half_width")):
            values = {m.title: getattr(found[m.key], field) if m.key in found else None for m in chosen}
            rows.append({"run": name, **{m.title: number(m, values[m.title]) for m in chosen}})
    errors = {m.title: [s[f"{m.key}_se"] for s in summaries if s.get(f"{m.key}_se") is not None] for m in chosen}
    if any(errors.values()):
        rows.append({"run": "subset ±", **{m.title: number(m, max(errors[m.title], default=None)) for m in chosen}})
    return rows


def table_note(rows: Sequence[Row], summaries: Sequence[Mapping[str, Any]]) -> str:
    """The line below the table: units, what the signs in it mean, and whether minima were looked for at every step."""
    cells = [text for row in rows for text in row.values()]
    note = NOTE + SAMPLING * ("subset ±" in cells) + NEVER * any(text.endswith("*") for text in cells)
    seen = {(s["evaluations"], s["steps"]) for s in summaries if s.get("min_accuracy") is not None}
    if seen and "min-ACC" in rows[0] and min(seen)[0] < min(seen)[1]:
        note += SPARSE.format(*min(seen))
    return note


def results_table(
    seeds: Sequence[int],
    summaries: Sequence[Mapping[str, Any]],
    *,
    title: str | None = None,
    metrics: Iterable[str] | None = None,
) -> "Table":
    """`result_rows` as a table for `rich.console.Console.print`."""
    from rich.table import Table
    from rich.text import Text

    rows = result_rows(seeds, summaries, metrics)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    table.title, table.title_justify = (Text(title) if title else None), "left"
    for index, name in enumerate(rows[0] if rows else ()):
        # one word per line: narrow columns, and no word is cut
        table.add_column(name.replace(" ", "\n"), justify="right" if index else "left", vertical="bottom")
    for index, row in enumerate(rows):
        table.add_row(*row.values(), style="bold" if row["run"] == "mean" else "dim" if index > len(seeds) else None)
    table.caption = Text(table_note(rows, summaries), style="dim")
    return table


def of_run(metric: Metric, summary: Mapping[str, Any]) -> str:
    text = number(metric, summary.get(metric.key))
    return text + "*" if metric.key == "recovery_iterations" and summary.get("recovery_missing") else text


def number(metric: Metric, value: float | None) -> str:
    if value is None:
        return "-"
    text = f"{100 * value if metric.unit == 'fraction' else value:.1f}"
    return "0.0" if text == "-0.0" else text
