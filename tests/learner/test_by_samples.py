"""Evaluation by samples, as online protocols prescribe it, and what comes of it in the summary."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from test_seams import Linear, level_scenario
from tiny import assert_survives_kill, learner_for, make_store, run, split_scenario

from clbench.evaluator import Schedule
from clbench.metrics import Curve, per_level
from clbench.scenarios.model import Scenario, StreamDefaults

BY_SAMPLES = Schedule(0, 0, 7)


def online_scenario() -> Scenario:
    """Three tasks of 24 rows, one pass in batches of 5 with three updates each."""
    defaults = StreamDefaults(batch_size=5, updates_per_batch=3, eval_samples=7)
    return replace(split_scenario(make_store(), online=True), defaults=defaults)


def test_evaluations_come_where_the_protocol_has_them() -> None:
    make = partial(learner_for, online_scenario(), Linear, schedule=BY_SAMPLES)
    learner = assert_survives_kill(make, at_most=20)
    # samples behind each batch, over the ragged last ones of the tasks: strictly more than a further multiple of 7
    behind = [start + n for start in (0, 24, 48) for n in (5, 10, 15, 20, 24)]
    expected, due = [], 7
    for n in behind:
        if n > due:
            expected.append(n)
            due += 7
    ends = [24, 48, 72]
    points = [(step, position) for step, _, _, position in learner.evaluator.points[1:]]
    assert [position for _, position in points] == sorted({*expected, *ends})
    assert all(step == 3 * (behind.index(position) + 1) for step, position in points), "not behind the last update"
    assert learner.sampled == len(expected)


def test_evaluation_off_stays_off() -> None:
    assert not run(learner_for(online_scenario(), Linear, schedule=Schedule(0))).evaluator.points


@pytest.mark.parametrize("period", [1, 5, 6, 100])
def test_any_period(period: int) -> None:
    learner = run(learner_for(online_scenario(), Linear, schedule=Schedule(0, 0, period)))
    positions = [position for _, _, _, position in learner.evaluator.points[1:]]
    assert positions == sorted(set(positions)), "twice behind one batch"
    assert len(positions) <= BY_SAMPLES._replace(samples=period).count(1, 72) + 3


def test_a_level_counts_from_where_it_opens() -> None:
    """Two groups per level; the fine level opens in the second task."""
    curve = Curve.of(
        steps=[1, 2, 3], task=[0, 0, 1], position=[10, 20, 30],
        hits=[[5, 0, 0, 0], [10, 5, 0, 0], [4, 6, 8, 0]],
        valid=[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]],
        totals=[10] * 4, group_task=[-1] * 4, task_ends=[2, 3],
    )  # fmt: skip
    matrix = np.array([[1.0, 0.5, 0.0, 0.0], [0.4, 0.6, 0.8, 0.0]])
    active = np.array([[1, 1, 0, 0], [1, 1, 1, 0]], dtype=bool)
    levels = np.array([0, 0, 1, 1])
    coarse, fine = per_level(levels, matrix, curve, active, [10] * 4)
    assert coarse == {
        "level": 0, "a_auc": pytest.approx((0.5 + 0.75 + 0.5) / 3), "a_avg": pytest.approx((0.75 + 0.5) / 2),
        "a_last": pytest.approx(0.5), "f_last": pytest.approx((0.6 - 0.1) / 2),
    }  # fmt: skip
    assert fine == {"level": 1, "a_auc": 0.8, "a_avg": 0.8, "a_last": 0.8, "f_last": None}
    assert per_level(np.zeros(4, int), matrix, curve, active, [10] * 4) == []
    sampled, _ = per_level(levels, matrix, curve, active, [10] * 4, 14)
    assert sampled["a_auc"] == pytest.approx((0.75 + 0.5) / 2), "the official evaluations are behind 20 and 30 samples"


def test_softmax_of_a_level_is_its_own() -> None:
    """A sample of one level gives no gradient to the rows of the head that belong to another (hle card, section 6)."""
    from clbench.methods.finetune import METHOD

    learner = learner_for(level_scenario(), METHOD, store=make_store())
    method = learner.method
    loss = method.loss(torch.rand(4, 1, 6, 6), torch.tensor([6, 7, 6, 7]), torch.ones(8, dtype=torch.bool))
    loss.backward()
    gradient = method.classifier.weight.grad
    assert gradient is not None
    assert gradient[:6].abs().max() == 0
    assert gradient[6:].abs().max() > 0
