"""A picture of a scenario's stream: which classes come when, and what they are tested on.

Left: classes downwards (by label level, then by task, those of no single task last), stream position to the right,
darker where a class makes up more of the stream. A class has the colour of the task that introduces it, so rehearsal
shows as old colours in later tasks; blurry classes, of no single task, are grey. Right: for each test group the classes
tested (coloured) among those that an answer may come from (light grey). In the `domain` setting, where tasks share
their classes, domains take the place of classes. Readable without colours: those of neighbouring tasks differ in
lightness, and task switches are lines.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from clbench.atomic import atomic_write_bytes
from clbench.scenarios.describe import binned, class_rows, domain_lanes
from clbench.scenarios.model import Scenario

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "task_colours"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

COLUMNS = 1600  # of the left panel's image, more than it has pixels
MAX_BINS = 400  # parts of the stream; of some ten rows at least, so that they say something about shares
MAX_NAMES = 40  # beyond so many classes their names cannot be read, and ids are shown
LINE = "0.25"
BLURRY = 0.35  # grey of classes that belong to no single task


def draw(scenario: Scenario, path: Path) -> Path:
    """Write the picture of `scenario` as a PNG file to `path` and return it."""
    data = io.BytesIO()
    picture(scenario).savefig(data, format="png", dpi=120)
    atomic_write_bytes(path, data.getvalue())
    return path


def task_colours(num_tasks: int) -> Floats:
    """(K, 3) RGB in [0, 1]: hues run once round the circle, lightness alternates, so that neighbours differ in grey."""
    from matplotlib.colors import hsv_to_rgb

    index = np.arange(num_tasks)
    hue = (0.58 + 0.83 * index / max(num_tasks, 1)) % 1
    colours: Floats = hsv_to_rgb(np.stack([hue, np.full(num_tasks, 0.75), np.ones(num_tasks)], axis=1))
    luminance = (colours**2.2) @ [0.2126, 0.7152, 0.0722]
    wanted = np.where(index % 2 == 0, 0.13, 0.32)  # both dark enough to fade towards white
    scale = (wanted / luminance)[:, None]
    lighter = 1 - (1 - colours**2.2) * (1 - wanted[:, None]) / (1 - luminance[:, None])
    return np.clip(np.where(scale <= 1, colours**2.2 * scale, lighter), 0, 1) ** (1 / 2.2)


def picture(scenario: Scenario) -> "Figure":
    """Draw `scenario` on a new figure, which belongs to no window and no global state."""
    from matplotlib.figure import Figure

    lanes = lanes_of(scenario)
    colours = task_colours(len(scenario.tasks))
    height = float(np.clip(1.6 + 0.17 * len(lanes.names), 3.4, 8.0))
    width = float(np.clip(0.16 * len(scenario.groups), 1.5, 3.2))
    figure = Figure(figsize=(8.6 + width, height), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[7.0, width], height_ratios=[0.22, height - 1.2])
    stream = figure.add_subplot(grid[1, 0])
    band = figure.add_subplot(grid[0, 0], sharex=stream)
    groups = figure.add_subplot(grid[1, 1], sharey=stream)
    draw_stream(stream, scenario, lanes, colours)
    draw_band(band, scenario, colours)
    draw_groups(groups, scenario, lanes, colours)
    passes = "online, one pass" if scenario.online else f"{scenario.defaults.epochs} epochs per task, reshuffled"
    datasets = scenario.datasets
    named = " + ".join(datasets) if len(datasets) <= 3 else f"{len(datasets)} data sets"
    figure.suptitle(
        f"{scenario.id}   {named}: {scenario.num_classes} classes, {len(scenario.tasks)} "
        f"tasks, {scenario.offsets[-1]:,} rows, {passes}; {scenario.setting}-incremental",
        fontsize=9,
        parse_math=False,
    )
    return figure


class Picture(NamedTuple):
    """What stands from top to bottom. density: (L, bins) rows of each lane per row of the stream. home: (L,) task whose
    colour it has. tested, allowed: (L, G) bool, what each test group asks for, and what an answer to it may be.
    level: (L,) label level."""

    kind: str
    names: Sequence[str]
    ids: Ints
    density: Floats
    home: Ints
    tested: npt.NDArray[np.bool_]
    allowed: npt.NDArray[np.bool_]
    level: Ints


def lanes_of(scenario: Scenario) -> Picture:
    """Classes by level and id, or the domains of a domain-incremental scenario."""
    edges = bin_edges(scenario)
    widths = np.diff(edges)
    if scenario.setting == "domain":
        lanes = domain_lanes(scenario)
        number = len(lanes.names)
        density = binned(scenario, lanes.of_task, number, torch.from_numpy(edges)).numpy() / widths
        tested = np.zeros((number, len(scenario.groups)), np.bool_)
        for column, lane in enumerate(lanes.of_group):
            tested[lane if lane >= 0 else slice(None), column] = True
        home = np.zeros(number, np.int64)
        for index in reversed(range(len(lanes.of_task))):
            home[lanes.of_task[index].unique().numpy()] = index
        zeros = np.zeros(number, np.int64)
        return Picture("domain", lanes.names, np.arange(number), density, home, tested, tested, zeros)
    home = home_tasks(scenario)
    blurry = np.zeros(scenario.num_classes, np.bool_)  # classes of no single task stand below the others
    for group in scenario.groups:
        if group.task is None and scenario.online:
            blurry[np.unique(group.targets.numpy())] = True
    rows = np.lexsort((np.arange(scenario.num_classes), home, blurry, scenario.classes.level.numpy()))
    home[blurry] = -1
    density = class_rows(scenario, torch.from_numpy(edges)).numpy()[rows] / widths
    tested, allowed = (np.zeros((scenario.num_classes, len(scenario.groups)), np.bool_) for _ in range(2))
    for column, group in enumerate(scenario.groups):
        tested[np.unique(group.targets.numpy()), column] = True
        allowed[group.classes.numpy(), column] = True
    names = [scenario.classes.names[i] for i in rows.tolist()]
    level = scenario.classes.level.numpy()[rows]
    return Picture("class", names, rows, density, home[rows], tested[rows], allowed[rows], level)


def draw_stream(axes: "Axes", scenario: Scenario, lanes: Picture, colours: Floats) -> None:
    """Density of each lane along the stream, as an image of one row per lane."""
    total, number = scenario.offsets[-1], len(lanes.names)
    density, edges = lanes.density, bin_edges(scenario)
    present = density > 0
    if lanes.kind == "domain":
        strength = np.sqrt(np.clip(density, 0, 1))  # shares of the stream: they say how much of it is rehearsal
    else:
        # full colour where the class is as dense as on average over the bins it occurs in
        usual = density.sum(1, keepdims=True) / np.maximum(present.sum(1, keepdims=True), 1)
        strength = np.sqrt(np.clip(density / np.where(usual > 0, usual, 1), 0, 1))
    strength = np.where(present, 0.15 + 0.85 * strength, 0)  # a single row still shows
    position = (np.arange(COLUMNS) + 0.5) * total / COLUMNS
    strength = strength[:, np.searchsorted(edges, position, side="right") - 1, None]
    colour = np.where(lanes.home[:, None] < 0, BLURRY, colours[lanes.home])[:, None]
    axes.imshow(
        1 - strength * (1 - colour), aspect="auto", interpolation="nearest", extent=(0, total, number - 0.5, -0.5)
    )
    for offset in scenario.offsets[1:-1]:
        axes.axvline(offset, color=LINE, linewidth=0.5 if len(scenario.tasks) <= 20 else 0.2)
    borders = np.flatnonzero(np.diff(lanes.level))
    for border in borders:
        axes.axhline(border + 0.5, color=LINE, linewidth=1.2)
    for top in (0, *(borders + 1)) if len(borders) else ():
        axes.text(total, top - 0.4, f"level {lanes.level[top]} ", ha="right", va="top", fontsize=7)
    if number <= MAX_NAMES:
        names = [name if len(name) <= 28 else name[:26] + "..." for name in lanes.names]
        axes.set_yticks(np.arange(number), names, fontsize=7, parse_math=False)
        axes.set_ylabel(lanes.kind, fontsize=8)
    elif len(scenario.datasets) > 1 and lanes.kind == "class":
        middles = [np.flatnonzero(lanes.home == task).mean() for task in range(len(scenario.tasks))]
        axes.set_yticks(middles, [task.name for task in scenario.tasks], fontsize=7, parse_math=False)
        axes.set_ylabel("classes of each data set", fontsize=8)
    else:
        axes.set_ylabel(f"{lanes.kind} id", fontsize=8)
        step = 10 if number <= 200 else 50
        ticks = np.arange(0, number, step)  # ids need not ascend: blurry classes come last
        axes.set_yticks(ticks, [str(lanes.ids[i]) for i in ticks], fontsize=7)
    axes.set_xlabel(f"stream position (training rows); the darker, the more of the {lanes.kind}", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def bin_edges(scenario: Scenario) -> Ints:
    """(bins + 1,) stream positions. Task switches are edges, so that no bin shows two tasks as if they mixed."""
    total = scenario.offsets[-1]
    bins = min(MAX_BINS, max(total // 10, min(total, 100)))
    parts = [
        np.linspace(start, end, max(round(bins * (end - start) / total), 1) + 1)
        for start, end in zip(scenario.offsets, scenario.offsets[1:], strict=False)
    ]
    return np.unique(np.concatenate(parts).round().astype(np.int64))


def home_tasks(scenario: Scenario) -> Ints:
    """(C,) index of the task that introduces each class."""
    home = np.zeros(scenario.num_classes, dtype=np.int64)
    for index, task in enumerate(scenario.tasks):
        home[task.classes.numpy()] = index
    return home


def draw_band(axes: "Axes", scenario: Scenario, colours: Floats) -> None:
    """The tasks as a ruler over the stream: the key to their colours."""
    offsets = np.array(scenario.offsets)
    lengths = np.diff(offsets)
    axes.broken_barh(list(zip(offsets[:-1], lengths, strict=True)), (0, 1), facecolors=colours, edgecolors="white")
    axes.set_ylim(0, 1)
    for index in np.flatnonzero(lengths > 0.02 * offsets[-1]):
        axes.text(
            offsets[index] + lengths[index] / 2, 0.45, str(index), ha="center", va="center", color="white", fontsize=7
        )
    axes.set_ylabel("task", rotation=0, ha="right", va="center", fontsize=8)
    axes.set_yticks([])
    axes.tick_params(axis="x", bottom=False, labelbottom=False)
    for side in axes.spines.values():
        side.set_visible(False)


def draw_groups(axes: "Axes", scenario: Scenario, lanes: Picture, colours: Floats) -> None:
    """One column per test group."""
    num_groups = len(scenario.groups)
    image = np.ones((len(lanes.names), num_groups, 3))
    for column, group in enumerate(scenario.groups):
        image[lanes.allowed[:, column], column] = 0.92
        image[lanes.tested[:, column], column] = BLURRY if group.task is None else colours[group.task]
    axes.imshow(
        image, aspect="auto", interpolation="nearest", extent=(-0.5, num_groups - 0.5, len(lanes.names) - 0.5, -0.5)
    )
    for border in range(1, num_groups) if num_groups <= 40 else ():
        axes.axvline(border - 0.5, color="white", linewidth=1.0)
    step = -(-num_groups // 12)
    axes.set_xticks(np.arange(0, num_groups, step))
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", labelleft=False, left=False)
    num_rows = sum(len(group.rows) for group in scenario.groups)
    note = "" if lanes.kind == "domain" else "\ngrey: other answers allowed"
    axes.set_xlabel(f"test groups ({num_rows:,} rows){note}", fontsize=8)
