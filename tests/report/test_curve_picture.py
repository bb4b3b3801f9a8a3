"""The curve picture: it shows every value that matters, in colour and in grey, for few and for many tasks."""

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clbench.metrics import Curve
from clbench.report.curve import MAX_LINES, caption, draw_curve, figure, spread, thin

percentages = st.floats(0, 100, allow_subnormal=False)


def learning(num_tasks: int, steps_per_task: int) -> Curve:
    """Accuracy falls at each switch and comes back."""
    steps = np.arange(num_tasks * steps_per_task + 1)
    task = np.maximum(steps - 1, 0) // steps_per_task
    since = np.where(steps == 0, 0, (steps - 1) % steps_per_task + 1)
    hits = np.round(100 * (1 - 0.8 * np.exp(-since / 5)))[:, None].repeat(num_tasks, 1)
    return Curve.of(
        steps=steps, task=task, hits=hits, valid=np.arange(num_tasks) <= task[:, None], totals=[100] * num_tasks,
        group_task=np.arange(num_tasks), task_ends=(np.arange(num_tasks) + 1) * steps_per_task,
        groups=[f"task {k}" for k in range(num_tasks)],
    )  # fmt: skip


@pytest.mark.parametrize(("num_tasks", "steps"), [(1, 3), (2, 10), (5, 200), (20, 100), (60, 5)])
def test_a_png_of_readable_size(tmp_path: Path, num_tasks: int, steps: int) -> None:
    path = draw_curve(learning(num_tasks, steps), tmp_path / "curve.png", title="er [x] $5 on split@1, seed 0")
    image = Image.open(path)
    assert image.format == "PNG"
    assert image.width == 1500
    assert 700 < image.height < 2000
    assert [p.name for p in tmp_path.iterdir()] == ["curve.png"]


@pytest.mark.parametrize("num_tasks", [5, 12])
def test_every_task_is_drawn_with_its_name_and_its_lowest_point(num_tasks: int) -> None:
    curve = learning(num_tasks, 30)
    page = figure(curve, "a title")
    axes = page.axes[-1]
    page.savefig(io.BytesIO(), format="png", dpi=20)
    texts = {text.get_text() for text in axes.texts} | {label.get_text() for label in axes.get_yticklabels()}
    assert {f"task {k}" for k in range(num_tasks)} <= texts
    lowest = axes.collections[-1].get_offsets()
    assert len(lowest) == num_tasks - 1
    assert sorted(lowest[:, 0]) == [30 * (k + 1) + 1 for k in range(num_tasks - 1)]
    switches = [
        line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_xdata()[0] == line.get_xdata()[1]
    ]
    assert sorted(line.get_xdata()[0] for line in switches) == [30 * (k + 1) for k in range(num_tasks - 1)]


def test_neighbouring_lines_differ_in_grey() -> None:
    axes = figure(learning(MAX_LINES, 30)).axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) > 2][1:]  # the first is the mean
    assert len(lines) == MAX_LINES
    lightness = [float(np.dot(line.get_color()[:3], [0.299, 0.587, 0.114])) for line in lines]
    assert all(later - earlier > 0.03 for earlier, later in pairwise(lightness))
    assert lightness[-1] < 0.75  # still to be seen on white
    patterns = [line.get_linestyle() + str(line._dash_pattern) for line in lines]
    assert all(a != b for a, b in pairwise(patterns))


def test_groups_that_were_never_evaluated_are_left_out() -> None:
    curve = Curve.of(
        steps=[1],
        task=[0],
        hits=[[3, 0]],
        valid=[[1, 0]],
        totals=[10, 10],
        group_task=[0, 1],
        task_ends=[],
        groups=["a", "b"],
    )
    axes = figure(curve).axes[0]
    assert [text.get_text() for text in axes.texts if text.get_text() in "ab"] == ["a"]


def test_the_caption_states_the_sampling_error() -> None:
    assert "100 test rows" in caption(learning(2, 3))
    assert "±5.0 points" in caption(learning(2, 3))


@given(st.integers(700, 5000), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_thinning_loses_no_extreme_and_crosses_no_switch(number: int, tasks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, task = rng.random(number), np.arange(number) * tasks // number
    values[rng.random(number) < 0.1] = np.nan
    line = thin(np.arange(number), values, task, columns=100)
    assert len(line.step) <= 100 + tasks
    assert line.low.min() == pytest.approx(100 * np.nanmin(values))
    assert line.high.max() == pytest.approx(100 * np.nanmax(values))
    assert line.last == pytest.approx(100 * values[np.isfinite(values)][-1])
    for k in range(tasks):
        own = 100 * values[task == k]
        inside = (line.step >= np.flatnonzero(task == k)[0]) & (line.step <= np.flatnonzero(task == k)[-1])
        if np.isfinite(own).any():
            assert line.low[inside].min() == pytest.approx(np.nanmin(own))
    assert np.all((line.low <= line.mean + 1e-9) & (line.mean <= line.high + 1e-9))


@given(st.lists(percentages, min_size=1, max_size=30), st.floats(0.1, 10))
def test_names_are_spread_in_order_and_inside(wanted: list[float], gap: float) -> None:
    at = spread(np.array(wanted), gap, 0, 100)
    fitting = min(gap, 100 / max(len(wanted) - 1, 1))
    assert np.all(np.diff(np.sort(at)) >= fitting - 1e-6)
    assert np.all((at >= -1e-6) & (at <= 100 + 1e-6))
    order = np.argsort(wanted, kind="stable")
    assert np.all(np.diff(at[order]) >= 0)


def test_names_with_room_stay_where_they_are() -> None:
    assert spread(np.array([50.0, 10.0, 90.0]), 5, 0, 100) == pytest.approx([50, 10, 90])
    assert spread(np.array([50.0, 50.0]), 4, 0, 100) == pytest.approx([48, 52])
