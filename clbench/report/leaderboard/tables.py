"""The tables of a report as text: Markdown, CSV, LaTeX with booktabs. The same rows and numbers as the page."""

import csv
import io
from collections.abc import Iterable, Sequence

from clbench.metrics import Aggregate, Metric, find_metric, list_metrics
from clbench.report.leaderboard.beside import Beside, beside_board, beside_row
from clbench.report.leaderboard.boards import Board, Row
from clbench.report.leaderboard.records import LeftOut, Run

__all__ = ["latex", "markdown", "results_csv", "runs_csv"]

COSTS = ("memory_bytes", "num_parameters", "time_s", "peak_memory_bytes", "forward_flops_per_image", "images_trained")


# -- Markdown ---------------------------------------------------------------------------------------------------------
def markdown(boards: Sequence[Board], left_out: Sequence[LeftOut]) -> str:
    """All boards, then what is in none of them."""
    lines = ["# Leaderboard", "", NOTE, ""]
    for board in boards:
        lines += [f"## {md(board.label)}", "", md(about(board)), ""]
        lines += [f"- {md(note)}" for note in board.notes] + [""] * bool(board.notes)
        metrics = [find_metric(key) for key in shown_metrics(board)]
        header = [
            "#",
            "method",
            "backbone",
            "hyperparameters",
            "seeds",
            *(metric.title for metric in metrics),
            "published",
        ]
        lines += ["| " + " | ".join(md(title) for title in header) + " |", "|---" * len(header) + "|"]
        for rank, row in zip(ranks(board), board.rows, strict=True):
            cells = [rank, row.label, row.spec.backbone, row.provenance.badge, seeds_text(row)]
            cells += [interval(row.stats.get(metric.key), metric) for metric in metrics]
            cells += ["; ".join(published_text(item) for item in beside_row(board, row)[:3]) or "–"]
            lines.append("| " + " | ".join(md(cell) for cell in cells) + " |")
        lines.append("")
        for row in board.rows:
            lines += [f"- {md(row.label)}: {md(note)}" for note in remarks(row)]
        others = beside_board(board)
        if others:
            lines += ["", "Published for methods that have no row here: " + md("; ".join(
                f"{item.number.method} {published_text(item)}" for item in others)) + "."]  # fmt: skip
        lines.append("")
    if left_out:
        lines += ["## Not in the tables", "", *(f"- `{plain(item.name)}`: {md(item.why)}" for item in left_out), ""]
    return "\n".join(lines)


NOTE = (
    "Mean ± standard deviation over seeds, in brackets the half width of the 95 % t interval of the mean; accuracies "
    "in percent. Hyperparameters: where their values come from. A row is ranked by the first metric of its table."
)
SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]#|"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})


def md(text: str) -> str:
    """Text that Markdown shows as it is."""
    return plain(text).translate(SPECIAL)


def plain(text: str) -> str:
    """One line, without control characters and backticks."""
    return "".join(c if c.isprintable() else " " for c in text).replace("`", "'")


# -- LaTeX ------------------------------------------------------------------------------------------------------------
def latex(boards: Sequence[Board]) -> str:
    """One `table` per board; needs `\\usepackage{booktabs}`. The best mean of each column is bold."""
    parts = ["% made by clbench report; needs \\usepackage{booktabs}"]
    for board in boards:
        metrics = [find_metric(key) for key in shown_metrics(board)]
        best = {metric.key: best_rows(board, metric) for metric in metrics}
        lines = [
            "\\begin{table}", "  \\centering", f"  \\caption{{{tex(board.label)}: {tex(about(board))}. {TEX_NOTE}}}",
            f"  \\begin{{tabular}}{{llr{'r' * len(metrics)}}}", "    \\toprule",
            "    " + " & ".join(["method", "hyperparameters", "seeds", *(tex(m.title) for m in metrics)]) + " \\\\",
            "    \\midrule",
        ]  # fmt: skip
        for row in board.rows:
            cells = [tex(row.label), tex(row.provenance.badge), str(len(row.runs))]
            for metric in metrics:
                cells.append(tex_number(row.stats.get(metric.key), metric, bold=row in best[metric.key]))
            lines.append("    " + " & ".join(cells) + " \\\\")
        lines += ["    \\bottomrule", "  \\end{tabular}", "\\end{table}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


TEX_NOTE = "Mean $\\pm$ standard deviation over seeds, accuracies in percent."
TEX: dict[str, str | int | None] = {
    "\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", "$": "\\$", "&": "\\&", "#": "\\#", "%": "\\%", "_": "\\_",
    "^": "\\textasciicircum{}", "~": "\\textasciitilde{}", "<": "\\textless{}", ">": "\\textgreater{}",
    "·": "$\\cdot$", "±": "$\\pm$", "≤": "$\\le$", "…": "\\dots{}",
}  # fmt: skip


def tex(text: str) -> str:
    """Text that LaTeX shows as it is."""
    return plain(text).translate(str.maketrans(TEX))


def tex_number(found: Aggregate | None, metric: Metric, *, bold: bool) -> str:
    if found is None:
        return "--"
    mean = number(found.mean, metric)
    spread = "" if found.std is None else f" \\pm {number(found.std, metric)}"
    return f"$\\mathbf{{{mean}}}{spread}$" if bold else f"${mean}{spread}$"


# -- CSV --------------------------------------------------------------------------------------------------------------
def results_csv(boards: Sequence[Board]) -> str:
    """One line per row of a board; fractions as fractions. `<metric>_ci95` is the half width of the t interval."""
    keys = [metric.key for metric in list_metrics() if any(metric.key in r.stats for b in boards for r in b.rows)]
    header = ["board", "scenario", "scenario_params", "setting", "mask", "data_fingerprint", "rank", "method", "label",
              "backbone", "hyperparameters", "hyperparameters_from", "provenance", "contaminated", "seeds", "missing",
              "unfinished", "schedule", "published",
              *(f"{key}_{part}" for key in keys for part in PARTS), *COSTS]  # fmt: skip
    lines = []
    for board in boards:
        for rank, row in zip(ranks(board), board.rows, strict=True):
            spec = row.spec
            values = "; ".join(f"{name}={entry.value}" for name, entry in spec.hyperparameters.items())
            params = "; ".join(f"{name}={value}" for name, value in spec.scenario_params.items())
            line: list[object] = [
                board.label, board.scenario, params, spec.setting, spec.mask, spec.data_fingerprint, rank, row.method,
                row.label, spec.backbone, values, row.provenance.badge, row.provenance.text, row.contaminated or "",
                seed_list(row.runs), seed_list(row.missing), seed_list(row.pending), row.schedule,
                "; ".join(published_text(item) for item in beside_row(board, row)),
            ]  # fmt: skip
            for key in keys:
                found = row.stats.get(key)
                line += ["", "", "", ""] if found is None else [found.mean, found.std, found.half_width, found.num]
            lines.append([*line, *(row.cost.get(cost, "") for cost in COSTS)])
    return to_csv(header, lines)


PARTS = ("mean", "std", "ci95", "n")


def runs_csv(boards: Sequence[Board]) -> str:
    """One line per run that is in a table, unfinished ones included."""
    keys = [key for metric in list_metrics() for key in metric.keys]
    header = ["record", "board", "method", "label", "order_seed", "seed", "state", *keys, "weights_sha256"]
    lines = []
    for board in boards:
        for row in board.rows:
            for run in sorted(row.all_runs, key=seed_of):
                order, seed = seed_of(run)
                lines.append([run.name, board.label, row.method, row.label, order, seed, run.state,
                              *(run.summary.get(key) for key in [*keys, "weights_sha256"])])  # fmt: skip
    return to_csv(header, lines)


def to_csv(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[csv_cell(value) for value in line] for line in lines])
    return text.getvalue()


def csv_cell(value: object) -> object:
    """Empty for None. Text that a spreadsheet would take for a formula gets an apostrophe in front."""
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t") else value


# -- shared -----------------------------------------------------------------------------------------------------------
def shown_metrics(board: Board) -> list[str]:
    """The board's metrics that any of its rows has."""
    return [key for key in board.metrics if any(key in row.stats for row in board.rows)] or [board.primary]


def ranks(board: Board) -> list[str]:
    """1, 2, ... by the mean of the first metric; equal means share a rank; `–` without a finished run."""
    out: list[str] = []
    for index, row in enumerate(board.rows):
        found = row.stats.get(board.primary)
        if found is None:
            out.append("–")
            continue
        before = board.rows[index - 1].stats.get(board.primary) if index else None
        out.append(out[-1] if before is not None and before.mean == found.mean else str(index + 1))
    return out


def best_rows(board: Board, metric: Metric) -> list[Row]:
    means = [(row, row.stats[metric.key].mean) for row in board.rows if board.comparable(row, metric.key)]
    if len(means) < 2:
        return []
    best = (max if metric.higher_is_better else min)(mean for _, mean in means)
    return [row for row, mean in means if mean == best]


def about(board: Board) -> str:
    """`class-incremental, 10 tasks, 100 classes, answers from the seen classes`."""
    spec = board.spec
    mask = {"seen": "the classes seen so far", "all": "all classes", "task": "the classes of the task"}[spec.mask]
    text = f"{spec.setting}-incremental, {spec.num_tasks} tasks, {spec.num_classes} classes, answers from {mask}"
    return text + (f", protocol family {spec.protocol_family}" if spec.protocol_family else "")


def number(value: float, metric: Metric) -> str:
    text = f"{100 * value if metric.unit == 'fraction' else value:.1f}"
    return "0.0" if text == "-0.0" else text


def interval(found: Aggregate | None, metric: Metric) -> str:
    """`93.6 ± 0.5 [1.2]`."""
    if found is None:
        return "–"
    if found.std is None or found.half_width is None:
        return number(found.mean, metric)
    return f"{number(found.mean, metric)} ± {number(found.std, metric)} [{number(found.half_width, metric)}]"


def published_text(item: Beside) -> str:
    """`final accuracy 41.3 ± 0.9 (verified; other setting: capacity: theirs 1000, ours 500)`."""
    theirs, metric = item.number, find_metric(item.number.metric)
    spread = "" if theirs.spread is None else f" ± {number(theirs.spread, metric)}"
    setting = f"; other setting: {', '.join(item.differs)}" if item.differs else ""
    return f"{metric.title} {number(theirs.value, metric)}{spread} ({theirs.status}{setting})"


def seeds_text(row: Row) -> str:
    text = str(len(row.runs))
    if row.pending:
        states = sorted({run.state for run in row.pending.values()})
        text += f" ({len(row.pending)} {' or '.join(states)})"
    return text + (f" ({len(row.missing)} missing)" if row.missing else "")


def seed_list(seeds: Iterable[tuple[int, int]]) -> str:
    """`0, 1` or, where the order's seed is another one, `order 1993 / 1`."""
    return ", ".join(str(seed) if order == seed else f"order {order} / {seed}" for order, seed in sorted(seeds))


def seed_of(run: Run) -> tuple[int, int]:
    return run.known.order_seed, run.known.seed


def remarks(row: Row) -> list[str]:
    """What must be said of a row besides its numbers."""
    out = list(row.notes)
    if row.contaminated:
        out.append(f"contaminated: {row.contaminated}")
    if row.spec.protocol_changes:
        out.append(f"protocol family {row.spec.protocol_family}, changed: {', '.join(row.spec.protocol_changes)}")
    if row.missing and row.runs:
        out.append(f"seeds that other rows have and this one lacks: {seed_list(row.missing)}")
    out += [f"seed {seed_list([seed])} is {run.state}" + (f": {run.reason}" if run.reason else "")
            for seed, run in sorted(row.pending.items())]  # fmt: skip
    if row.schedule.startswith("mixed"):
        out.append("its seeds were evaluated on different schedules, so its curve metrics are not ranked")
    return out
