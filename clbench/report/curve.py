"""The picture of a run: accuracy of every group at every evaluated step, with the task switches and what they cost.

Up to `MAX_LINES` groups are lines in one panel, told apart in grey by line style, by lightness (darker is older) and by
their names at the right end. More groups get a row each, one below the other, as filled curves whose notches are the
dips. Long runs are drawn as a line (mean) in a band (lowest to highest) per pixel column, and no column crosses a
switch, so that no dip is lost.
"""

import io
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clbench.atomic import atomic_write_bytes
from clbench.metrics import Curve, stability
from clbench.metrics.curve import FloatArray, IntArray
from clbench.store import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "draw_curve", "figure"]

COLUMNS = 600  # points of a line; beyond them neighbours share a column
MAX_LINES = 8  # groups in one panel
MAX_NAMES = 40  # rows that get a name
STYLES = ("-", (0, (5, 1.6)), (0, (1.4, 1.2)), (0, (6, 1.4, 1.4, 1.4)))
LOWEST: dict[str, Any] = {
    "s": 24, "marker": "v", "edgecolors": "black", "linewidths": 0.8, "zorder": 6, "clip_on": False,
}  # fmt: skip
INK, FAINT = "0.15", "0.88"


class Line(NamedTuple):
    """What is drawn of a series: (n,) position, mean, lowest and highest percentage there; and the last of all."""

    step: FloatArray
    mean: FloatArray
    low: FloatArray
    high: FloatArray
    last: float


def draw(run: Path) -> Path | None:
    """Draw `curve.png` into a run's folder, unless it is there. None if there is no curve (evaluation was off), or no
    matplotlib (a bare compute node)."""
    path = run / "curve.png"
    if path.exists():
        return path
    if find_spec("matplotlib") is None:
        return None
    record = RunRecord(run)
    curve, spec = record.read_curve(), record.read_spec()
    if not len(curve.steps):
        return None
    return draw_curve(curve, path, title=f"{spec.method} on {spec.scenario}, seed {spec.seed}")


def draw_curve(curve: Curve, path: Path, *, title: str = "") -> Path:
    """Write the picture of a curve with at least one evaluation as a PNG file to `path` and return that."""
    data = io.BytesIO()
    figure(curve, title).savefig(data, format="png", dpi=150)
    atomic_write_bytes(path, data.getvalue())
    return path


def figure(curve: Curve, title: str = "") -> "Figure":
    """The picture as a figure of its own, which belongs to no window and no global state."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    groups = len(curve.groups)
    if groups <= MAX_LINES:
        page = Figure(figsize=(10, 5.4), layout="constrained")
        top = bottom = page.add_subplot()
        look: dict[str, Any] = {"color": "0.75", "linewidth": 3.6}
        several = curve.valid.sum(axis=1) > min(1, groups - 1)  # a mean of one group would lie on its line
        _mean(top, curve, several, **look)
        _lines(top, curve)
    else:
        height = min(0.3 * groups, 9)
        page = Figure(figsize=(10, 2.9 + height), layout="constrained")
        top, bottom = page.subplots(2, sharex=True, height_ratios=(1.7, height))
        look = {"color": "black", "linewidth": 1.8}
        _mean(top, curve, np.ones(len(curve.steps), np.bool_), **look)
        _rows(bottom, curve)
        bottom.spines["left"].set_visible(False)
    for axes in {top, bottom}:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        for end in curve.task_ends[curve.task_ends < curve.steps[-1]]:
            axes.axvline(end, color="0.35", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    top.set_ylim(-2, 102)
    top.set_ylabel("accuracy (%)")
    top.grid(axis="y", color=FAINT, linewidth=0.8)
    _number_tasks(top, curve)
    bottom.set_xlim(0, max(int(curve.steps[-1]), 1))
    bottom.set_xlabel("step (updates done)")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    handles = [
        Line2D([], [], label="mean over the tasks so far", **look),
        Line2D(
            [],
            [],
            color="0.5",
            marker="v",
            markeredgecolor="black",
            linewidth=0,
            label="lowest point since its task ended",
        ),
        Line2D([], [], color="0.35", linewidth=0.8, linestyle=(0, (2, 2)), label="task switch"),
    ]
    page.legend(
        handles=handles, loc="outside lower left", ncols=3, frameon=False, fontsize=8, alignment="left",
        title=caption(curve), title_fontsize=8,
    )  # fmt: skip
    page.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    return page


def caption(curve: Curve) -> str:
    """What one point rests on."""
    low, high = int(curve.totals.min()), int(curve.totals.max())
    rows = f"{low}" if low == high else f"{low} to {high}"
    error = 100 * 0.5 / np.sqrt(max(low, 1))
    return (
        f"{len(curve.steps)} evaluations on a fixed subset of {rows} test rows per task: "
        f"the sampling error of a point is at most ±{error:.1f} points (one standard deviation)"
    )


def thin(steps: IntArray, values: FloatArray, task: IntArray, columns: int = COLUMNS) -> Line:
    """Merge evaluations that would fall into one pixel column; every value counts, and tasks stay apart.

    steps, values, task: (S,), values NaN where there is none (left out).
    """
    keep = np.isfinite(values)
    steps, values, task = steps[keep], 100 * values[keep], task[keep]
    if len(steps) <= columns:
        return Line(steps.astype(np.float64), values, values, values, float(values[-1]) if len(values) else np.nan)
    column = (steps - steps[0]) * columns // (steps[-1] - steps[0] + 1)
    starts = np.flatnonzero(np.r_[True, (np.diff(column) != 0) | (np.diff(task) != 0)])
    count = np.diff(np.r_[starts, len(steps)])
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    mean = np.add.reduceat(values, starts) / count
    return Line(np.add.reduceat(steps, starts) / count, mean, low, high, float(values[-1]))


def spread(wanted: FloatArray, gap: float, low: float, high: float) -> FloatArray:
    """(n,) positions near `wanted`, in the same order, at least `gap` apart and inside [low, high] if they fit."""
    order = np.argsort(wanted, kind="stable")
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    ranks = np.arange(len(wanted)) * gap
    # with the ranks taken off, the nearest ordered positions are an isotonic regression: pool what is out of order
    blocks: list[tuple[float, int]] = []
    for value in wanted[order] - ranks:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    placed = np.concatenate([np.full(number, value) for value, number in blocks])
    out = np.empty(len(wanted))
    out[order] = np.clip(placed, low, max(low, high - ranks[-1])) + ranks
    return out


def _mean(axes: "Axes", curve: Curve, shown: NDArray[np.bool_], **look: Any) -> None:
    line = thin(curve.steps, np.where(shown, curve.mean_accuracy, np.nan), curve.task)
    axes.plot(line.step, line.mean, zorder=2, solid_joinstyle="round", **look)


def _lines(axes: "Axes", curve: Curve) -> None:
    colours = _colours(len(curve.groups))
    ends: list[tuple[int, float]] = []
    for group in range(len(curve.groups)):
        line = thin(curve.steps, curve.accuracy[:, group], curve.task)
        if not len(line.step):
            continue
        colour, style = colours[group], STYLES[group % len(STYLES)]
        axes.fill_between(line.step, line.low, line.high, color=colour, alpha=0.16, linewidth=0, zorder=3)
        axes.plot(line.step, line.mean, color=colour, linestyle=style, linewidth=1.4, zorder=4)
        ends.append((group, line.last))
    lows = stability.minima(curve)
    axes.scatter(lows.step, 100 * lows.lowest, c=colours[lows.group], **LOWEST)
    heights = spread(np.array([height for _, height in ends]), 4.2, 0, 100)
    for (group, height), at in zip(ends, heights, strict=True):
        pointer = {
            "arrowstyle": "-", "color": colours[group], "linestyle": STYLES[group % len(STYLES)], "linewidth": 1.4,
            "shrinkA": 0, "shrinkB": 0,
        }  # fmt: skip
        axes.annotate(
            _short(curve.groups[group]), (1, height), (1.035, at), xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"), va="center", fontsize=8, color=INK, annotation_clip=False,
            arrowprops=pointer,
        )  # fmt: skip


def _rows(axes: "Axes", curve: Curve) -> None:
    """Group g fills [g, g + 0.86] from the top; its name stands left, its last accuracy right."""
    groups = len(curve.groups)
    colours = _colours(groups)
    lows = stability.minima(curve)
    tall = 0.86
    for group in range(groups):
        line = thin(curve.steps, curve.accuracy[:, group], curve.task)
        if not len(line.step):
            continue
        base = groups - 1 - group
        axes.fill_between(line.step, base, base + tall * line.high / 100, color=colours[group], alpha=0.3, linewidth=0)
        axes.fill_between(line.step, base, base + tall * line.low / 100, color=colours[group], alpha=0.55, linewidth=0)
        axes.plot(line.step, base + tall * line.mean / 100, color=colours[group], linewidth=0.8)
        axes.axhline(base, color=FAINT, linewidth=0.6, zorder=0)
        if groups <= MAX_NAMES:
            axes.text(
                1.01, base + tall / 2, f"{line.last:.0f}", transform=axes.get_yaxis_transform(), va="center",
                fontsize=8, color=INK, clip_on=False,
            )  # fmt: skip
    heights = groups - 1 - lows.group + tall * lows.lowest
    axes.scatter(lows.step, heights, c=colours[lows.group], **LOWEST)
    named = np.arange(0, groups, -(-groups // MAX_NAMES))
    axes.set_yticks(groups - 1 - named + tall / 2, [_short(curve.groups[group]) for group in named], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(0, groups)
    axes.set_title(
        "each task, 0 to 100 %; at the right its accuracy (%) at the end", loc="left", fontsize=8, color="0.35"
    )


def _number_tasks(axes: "Axes", curve: Curve) -> None:
    """The tasks' numbers above, as far as there is room for them."""
    last = max(int(curve.steps[-1]), 1)
    edges = [0, *(int(end) for end in curve.task_ends if end < last), last]
    for number, (start, end) in enumerate(pairwise(edges)):
        if end - start >= last / 60:
            text = f"task {number}" if end - start >= last / 14 else str(number)
            axes.text((start + end) / 2, 103, text, ha="center", va="bottom", fontsize=8, color="0.35", clip_on=False)


def _colours(number: int) -> FloatArray:
    """(number, 4) RGBA, dark to light."""
    from matplotlib import colormaps

    out: FloatArray = colormaps["viridis"](np.linspace(0, 0.82, max(number, 2)))
    return out


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"
