from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from label_tables import balanced, real_layout
from PIL import Image

from clbench.data.classes import ClassTable
from clbench.errors import InputError
from clbench.report.stream_picture import bin_edges, draw, picture, task_colours
from clbench.scenarios import build, find
from clbench.scenarios.class_incremental import Params
from clbench.scenarios.class_incremental import build as build_tasks
from clbench.scenarios.describe import class_rows, describe
from clbench.scenarios.model import Scenario, Task

TABLE = balanced("toy", 200, 40, 4)
ONLINE = build_tasks([TABLE], 0, Params(tasks=2, online=True, val_share=0.1))


def rehearsing() -> Scenario:
    """The second task ends with 30 rows of the first."""
    first, second = ONLINE.tasks
    second = second._replace(
        rows=torch.cat([second.rows, first.rows[:30]]), targets=torch.cat([second.targets, first.targets[:30]])
    )
    return replace(ONLINE, tasks=(first, second))


# -- task table --------------------------------------------------------------------------------------------------
def test_describe() -> None:
    assert describe(ONLINE) == [
        {"task": 0, "name": "task 0", "classes": ("class 0", "class 1"), "start": 0, "train": 90, "val": 10, "test": 20,
         "share": 0.5, "old": 0.0},
        {"task": 1, "name": "task 1", "classes": ("class 2", "class 3"), "start": 90, "train": 90, "val": 10,
         "test": 20, "share": 0.5, "old": 0.0},
    ]  # fmt: skip
    row = describe(rehearsing())[1]
    assert (row["train"], row["old"], row["share"]) == (120, pytest.approx(0.25), pytest.approx(120 / 210))


def test_describe_an_empty_task() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    row = describe(replace(ONLINE, tasks=(*ONLINE.tasks, Task(nothing, nothing, nothing))))[2]
    assert (row["train"], row["share"], row["old"], row["name"]) == (0, 0.0, 0.0, "task 2")


# -- density -----------------------------------------------------------------------------------------------------
def test_class_rows_online_counts_where_rows_stand() -> None:
    scenario = rehearsing()
    edges = torch.tensor([0, 10, 90, 180, 210])
    counts = class_rows(scenario, edges)
    targets = torch.cat([task.targets for task in scenario.tasks])
    for column, (start, end) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        assert counts[:, column].tolist() == torch.bincount(targets[start:end], minlength=4).tolist()
    assert float(counts.sum()) == 210


def test_class_rows_offline_are_spread_over_the_task() -> None:
    scenario = build_tasks([TABLE], 0, Params(tasks=2))
    counts = class_rows(scenario, torch.tensor([0, 25, 100, 150, 200]))
    assert counts.tolist() == [[12.5, 37.5, 0, 0], [12.5, 37.5, 0, 0], [0, 0, 25, 25], [0, 0, 25, 25]]


def test_no_bin_mixes_two_tasks() -> None:
    for name, num_bins in (("split-digits", 143), ("online-split-cifar100", 400)):
        preset = find(name)
        scenario = build(preset, [real_layout(preset.datasets[0])], 0)
        edges = bin_edges(scenario)
        assert set(scenario.offsets) <= set(edges.tolist())
        assert abs(len(edges) - 1 - num_bins) <= len(scenario.tasks)
        assert (np.diff(edges) > 0).all()


# -- colours and picture -----------------------------------------------------------------------------------------
def luminance(colours: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(colours**2.2 @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("num_tasks", [1, 2, 5, 10, 20, 100])
def test_neighbouring_colours_differ_in_grey(num_tasks: int) -> None:
    colours = task_colours(num_tasks)
    assert colours.shape == (num_tasks, 3)
    assert 0 <= colours.min() <= colours.max() <= 1
    assert (np.abs(np.diff(luminance(colours))) > 0.1).all()
    assert (1.05 / (luminance(colours) + 0.05) > 2.4).all()  # contrast with white: paper, and numbers on the ruler
    assert len(np.unique(colours.round(3), axis=0)) == num_tasks


def panel(scenario: Scenario, index: int) -> npt.NDArray[np.float64]:
    """The image drawn in the panel: 0 the stream, 2 the groups."""
    (image,) = picture(scenario).axes[index].get_images()
    return np.asarray(image.get_array(), dtype=np.float64)


def test_stream_panel_shows_each_class_in_its_task_only() -> None:
    image = panel(build_tasks([TABLE], 0, Params(tasks=2)), 0)
    half = image.shape[1] // 2
    colours = task_colours(2)
    for row in range(4):
        own, other = (image[row, :half], image[row, half:]) if row < 2 else (image[row, half:], image[row, :half])
        assert np.allclose(other, 1)
        assert np.allclose(own, colours[row // 2])


def test_rehearsal_shows_as_old_colour() -> None:
    image = panel(rehearsing(), 0)
    late = image[:2, -image.shape[1] // 10 :]  # the last tenth of the stream is all rehearsal
    assert (late.min(axis=2) < 0.9).any(axis=0).all()
    assert np.allclose(image[2:, -image.shape[1] // 10 :], 1)
    direction = 1 - late.reshape(-1, 3)
    expected = 1 - task_colours(2)[0]
    strength = direction @ expected / (expected @ expected)
    assert np.allclose(direction, strength[:, None] * expected, atol=1e-9)


def test_domain_setting_has_the_colour_of_the_task() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    first = ONLINE.tasks[0]
    same = replace(ONLINE, tasks=(first, first._replace(classes=nothing)), setting="domain")
    image = panel(same, 0)
    dark = image[:2].reshape(2, 2, -1, 3).min(axis=(0, 2))  # per half of the stream, the fullest colour
    assert np.allclose(dark, task_colours(2), atol=1e-9)


def test_groups_panel() -> None:
    colours = task_colours(2)
    image = panel(ONLINE, 2)
    assert np.allclose(image[:2, 0], colours[0])
    assert np.allclose(image[2:, 1], colours[1])
    assert np.allclose(image[2:, 0], 0.92)  # allowed, not tested
    known_task = panel(build_tasks([TABLE], 0, Params(tasks=2, setting="task")), 2)
    assert np.allclose(known_task[2:, 0], 1)  # not even allowed


def test_levels_stand_apart_with_the_coarsest_on_top() -> None:
    level, parent = torch.tensor([1, 1, 1, 0]), torch.tensor([3, 3, 3, -1])
    scenario = replace(ONLINE, classes=ClassTable(("a", "b", "c", "all"), level, parent))
    axes = picture(scenario).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all", "a", "b", "c"]
    assert [text.get_text().strip() for text in axes.texts] == ["level 0", "level 1"]


@pytest.mark.parametrize("name", ["split-digits", "online-split-cifar100", "split-cifar100-b50"])
def test_draw(name: str, tmp_path: Path) -> None:
    preset = find(name)
    scenario = build(preset, [real_layout(preset.datasets[0])], 0)
    path = draw(scenario, tmp_path / "new folder" / f"{scenario.id}.png")
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"), dtype=np.float64)
    assert 380 < pixels.shape[0] < 1000
    assert 1100 < pixels.shape[1] < 1500
    assert 0.05 < (pixels < 200).mean() < 0.6  # neither empty nor full
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_odd_names_and_unwritable_folder(tmp_path: Path) -> None:
    names = ("a$b$c", "x_{y", "a very long name that would push the picture aside", "\\alpha")
    scenario = replace(ONLINE, classes=replace(ONLINE.classes, names=names))
    shown = [label.get_text() for label in picture(scenario).axes[0].get_yticklabels()]
    assert shown == ["a$b$c", "x_{y", "a very long name that woul...", "\\alpha"]
    assert draw(scenario, tmp_path / "odd.png").stat().st_size > 5_000
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        draw(scenario, tmp_path / "file" / "x.png")
