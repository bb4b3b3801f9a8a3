"""Batches as functions of the cursor."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_store, split_scenario

from clbench.data.reader import Reader
from clbench.scenarios.model import StreamDefaults
from clbench.stream import Cursor, Phase, Stream

STORE = make_store()
SCENARIO = split_scenario(STORE)


def stream(**options) -> Stream:
    scenario = options.pop("scenario", SCENARIO)
    view = options.pop("view", "")
    return Stream(scenario, Reader(STORE, {"train": view, "test": ""}), seed=options.pop("seed", 0), **options)


def rows_of_epoch(made: Stream, plan, epoch: int) -> list[int]:
    first = epoch * plan.per_epoch
    batches = [made.batch(plan, Cursor(plan.task, 0, i, 0, i)) for i in range(first, first + plan.per_epoch)]
    return torch.cat([b.rows for b in batches]).tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(0, 5), st.integers(0, 2), st.booleans())
def test_every_epoch_shows_each_row_once(batch: int, seed: int, task: int, listed: bool) -> None:
    made = stream(seed=seed)
    phase = Phase("train", batch_size=batch, epochs=2, order="listed" if listed else "shuffled")
    plan = made.plan(task, phase, 0)
    own = SCENARIO.tasks[task].rows.tolist()
    epochs = [rows_of_epoch(made, plan, epoch) for epoch in range(2)]
    for rows in epochs:
        assert sorted(rows) == sorted(own)
    if listed:
        assert epochs[0] == own
    assert plan.iterations == 2 * plan.per_epoch == plan.steps


def test_a_batch_is_a_function_of_its_cursor() -> None:
    phase = Phase("train", batch_size=7, epochs=3)
    a, b = stream(view="pad_crop(2) flip"), stream(view="pad_crop(2) flip")
    forward = [a.batch(a.plan(1, phase, 0), Cursor(1, 0, i, 0, 40 + i)) for i in range(12)]
    backward = [b.batch(b.plan(1, phase, 0), Cursor(1, 0, i, 0, 40 + i)) for i in reversed(range(12))]
    for one, other in zip(forward, reversed(backward), strict=True):
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, STORE.labels[one.rows])


def test_epochs_tasks_phases_and_seeds_shuffle_differently() -> None:
    made, other = stream(), stream(seed=1)
    phase = Phase("train", epochs=2)
    orders = [rows_of_epoch(made, made.plan(0, phase, 0), epoch) for epoch in range(2)]
    orders += [rows_of_epoch(made, made.plan(0, phase, 1), 0), rows_of_epoch(other, other.plan(0, phase, 0), 0)]
    assert len({tuple(order) for order in orders}) == 4


def test_global_generator_is_not_touched() -> None:
    before = torch.random.get_rng_state()
    made = stream(view="pad_crop(2)")
    made.batch(made.plan(0, Phase("train"), 0), Cursor(0, 0, 0, 0, 0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_sources() -> None:
    made = stream()
    seen = made.plan(1, Phase("all", source="seen", epochs=1), 0)
    assert sorted(seen.rows.tolist()) == sorted(torch.cat([t.rows for t in SCENARIO.tasks[:2]]).tolist())
    first = made.plan(0, Phase("few", first=4, epochs=1, order="listed"), 0)
    assert first.rows.tolist() == SCENARIO.tasks[0].rows[:4].tolist()
    none = made.plan(0, Phase("own", source="none", iterations=9), 0)
    assert (none.iterations, none.per_epoch, len(none.rows)) == (9, 0, 0)
    assert made.plan(0, Phase("val", source="val"), 0).iterations == 0
    task = SCENARIO.tasks[0]
    with_val = replace(SCENARIO, tasks=(task._replace(val=(task.rows[:3], task.targets[:3])), *SCENARIO.tasks[1:]))
    assert made.plan(0, Phase("val", source="val"), 0).rows.numel() == 0
    assert (
        stream(scenario=with_val).plan(0, Phase("val", source="val", epochs=1), 0).rows.tolist()
        == task.rows[:3].tolist()
    )


def test_iterations_go_round_the_source() -> None:
    made = stream()
    plan = made.plan(0, Phase("long", iterations=13, batch_size=10), 0)
    assert (plan.per_epoch, plan.iterations) == (3, 13)
    assert made.batch(plan, Cursor(0, 0, 12, 0, 12)).epoch == 4


def test_drop_last_leaves_out_the_ragged_batch_but_never_a_whole_task() -> None:
    scenario = replace(SCENARIO, defaults=StreamDefaults(batch_size=10, drop_last=True))
    assert stream(scenario=scenario).plan(0, Phase("train", epochs=1), 0).iterations == 2
    assert stream(scenario=scenario, batch_size=100).plan(0, Phase("train", epochs=1), 0).iterations == 1


def test_contradictory_phases_are_refused() -> None:
    with pytest.raises(ValueError, match="both epochs and iterations"):
        stream().plan(0, Phase("x", epochs=1, iterations=2), 0)
    with pytest.raises(ValueError, match="must give iterations"):
        stream().plan(0, Phase("x", source="none"), 0)


def test_online_streams_come_as_listed_and_once() -> None:
    scenario = replace(SCENARIO, online=True)
    made = stream(scenario=scenario, epochs=7)
    plan = made.plan(2, Phase("train"), 0)
    assert plan.iterations == plan.per_epoch
    assert rows_of_epoch(made, plan, 0) == SCENARIO.tasks[2].rows.tolist()
