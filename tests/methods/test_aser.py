"""ASER: Shapley values against the vector and by enumeration, draws and swaps against lists, and the whole method."""

import itertools
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_survives_kill, learner_for, make_store, run, split_scenario
from torch import Tensor

from clbench.evaluator import Schedule
from clbench.learner.hostreads import forbid_host_reads
from clbench.learner.learner import Learner
from clbench.methods.aser import METHOD as ASER
from clbench.methods.aser import balanced_slots, knn_shapley, swaps
from clbench.rng import generator
from clbench.stream.types import Cursor

VECTOR = json.loads((Path(__file__).parent / "fixtures" / "online_contrastive.json").read_text())["knn_shapley"]


def utility(right: tuple[bool, ...], order: list[int], chosen: set[int], k: int) -> float:
    """Share of the K nearest of the chosen candidates with the right label."""
    nearest = [i for i in order if i in chosen][:k]
    return sum(right[i] for i in nearest) / k


def shapley_by_enumeration(point: Tensor, target: int, candidates: Tensor, labels: list[int], k: int) -> list[float]:
    """Shapley's definition: the mean gain over all subsets of the others, weighted by their size."""
    order = (candidates - point).norm(dim=1).argsort().tolist()
    right, n = tuple(label == target for label in labels), len(labels)
    values = []
    for i in range(n):
        others = [j for j in range(n) if j != i]
        value = 0.0
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - 1 - size) / math.factorial(n)
            for chosen in itertools.combinations(others, size):
                gain = utility(right, order, {*chosen, i}, k) - utility(right, order, set(chosen), k)
                value += weight * gain
        values.append(value)
    return values


# -- values ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("padding", [0, 3])
def test_values_match_the_vector_and_ignore_invalid_candidates(padding: int) -> None:
    given_ = VECTOR["inputs"]
    points, candidates = (torch.tensor(given_[key]) for key in ("eval", "cand"))
    labels = torch.tensor(given_["cand_y"])
    candidates = torch.cat([candidates, points.repeat(2, 1)[:padding]])  # the nearest there could be, but invalid
    valid = torch.arange(len(candidates)) < len(labels)
    labels = torch.cat([labels, torch.tensor(given_["eval_y"]).repeat(2)[:padding]])
    got = knn_shapley(points, torch.tensor(given_["eval_y"]), candidates, labels, given_["K"], valid)
    torch.testing.assert_close(got[:, valid], torch.tensor(VECTOR["expected"]["sv"]), atol=1e-6, rtol=0)
    assert padding == 0 or got[:, ~valid].abs().max() == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 7), st.integers(1, 3), st.integers(0, 10**6))
def test_values_are_shapleys_and_sum_to_the_utility(num: int, k: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    points, candidates = (torch.randn(n, 3, generator=rng, dtype=torch.float64) for n in (2, num))
    targets, labels = (torch.randint(0, 3, (n,), generator=rng) for n in (2, num))
    values = knn_shapley(points, targets, candidates, labels, k)
    for i in range(2):
        expected = shapley_by_enumeration(points[i], int(targets[i]), candidates, labels.tolist(), k)
        assert values[i].tolist() == pytest.approx(expected, abs=1e-12)
        nearest = (candidates - points[i]).norm(dim=1).argsort()[:k]
        assert values[i].sum().item() == pytest.approx((labels[nearest] == targets[i]).double().mean().item())


# -- draws and swaps -------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.integers(1, 4), st.integers(0, 10**6))
def test_balanced_draws(labels: list[int], per_class: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    targets, excluded = torch.tensor(labels), torch.rand(len(labels), generator=rng) < 0.3
    slots, valid = balanced_slots(targets, torch.arange(5), per_class, torch.rand(len(labels), generator=rng), excluded)
    assert len(slots) == 5 * per_class
    for c in range(5):
        there = {i for i, label in enumerate(labels) if label == c and not excluded[i]}
        drawn = slots[c * per_class : (c + 1) * per_class][valid[c * per_class : (c + 1) * per_class]].tolist()
        assert set(drawn) <= there
        assert len(set(drawn)) == len(drawn) == min(per_class, len(there))


def test_classes_that_have_not_come_change_no_draw() -> None:
    targets, uniform = torch.tensor([4, 1, 4, 1, 1, 7]), torch.rand(6, generator=generator(0, "u"))
    excluded = torch.tensor([False, True, False, False, False, False])
    for kept in (None, excluded):
        slots, valid = balanced_slots(targets, torch.tensor([1, 4, 7]), 2, uniform, kept)
        among, there = balanced_slots(targets, torch.arange(100), 2, uniform, kept)
        assert slots[valid].tolist() == among[there].tolist()


def test_balanced_draws_are_even() -> None:
    targets = torch.tensor([0, 1, 1, 1, 0, 1])
    counts = torch.zeros(6)
    for key in range(2000):
        slots, valid = balanced_slots(targets, torch.arange(2), 1, torch.rand(6, generator=generator(0, "u", key)))
        counts.index_add_(0, slots, valid.float())
    assert (counts[[0, 4]] - 1000).abs().max() < 100
    assert (counts[[1, 2, 3, 5]] - 500).abs().max() < 100


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 10**6))
def test_swaps_match_a_list(held: int, new: int, seed: int) -> None:
    """The code's rule: sort all candidates; of the first n arrivals enter, of the rest exemplars leave, in order."""
    rng = torch.Generator().manual_seed(seed)
    value = torch.randn(held + new, generator=rng)
    valid = torch.rand(held, generator=rng) < 0.7
    slots = torch.randperm(50, generator=rng)[:held]
    got = swaps(value, valid, slots, 50).tolist()
    ranked = [i for i in value.argsort(descending=True).tolist() if i >= held or valid[i]]
    number = int(valid.sum())
    enters = [i - held for i in ranked[:number] if i >= held]
    leaves = [int(slots[i]) for i in ranked[number:] if i < held]
    expected = [50] * new
    for arrival, slot in zip(enters, leaves, strict=True):
        expected[arrival] = slot
    assert got == expected


# -- the method ------------------------------------------------------------------------------------------------------
def tiny(**options: object) -> Learner:
    changes = {key: options.pop(key) for key in list(options) if key not in ("save", "checkpoint_steps", "schedule")}
    config = ASER.Config(**{"lr": 0.05, "capacity": 12, "replay_batch_size": 4, **changes})
    return learner_for(split_scenario(make_store(), online=True), ASER, config=config, **options)


@pytest.mark.parametrize("changes", [{}, {"score": "asv", "update_rule": "reservoir"}, {"score": "neg_sv"}])
def test_survives_a_kill(changes: dict) -> None:
    whole = assert_survives_kill(partial(tiny, **changes), at_most=5)
    buffer = whole.method.buffer
    assert buffer.num_seen == 72
    assert len(buffer.rows.unique()) == 12, "one row twice"
    labels = whole.stream.read.store.labels
    assert torch.equal(labels[buffer.rows], buffer.targets), "target left its row"


def test_one_forward_pass_over_replay_then_stream() -> None:
    learner = tiny()
    plan = learner.plans()[0][0]
    for iteration in range(4):  # 12 slots: full behind the third batch
        batch = learner.stream.batch(plan, Cursor(0, 0, iteration, 0, iteration))
        with forbid_host_reads():
            inputs = learner.method.draw(batch)
            learner.method.keep(batch)
        extra = 0 if iteration == 0 else 4
        assert torch.equal(inputs.images[extra:], batch.images)
        assert torch.equal(inputs.targets[extra:], batch.targets)
        assert len(inputs.targets) == extra + len(batch.targets)
    assert len(learner.method.buffer) == 12
    assert learner.method.buffer.num_seen == 20


def test_memory_takes_new_classes_and_the_backbone_keeps_its_mode() -> None:
    learner = run(tiny(schedule=Schedule(0)))
    assert len(learner.method.buffer.targets.unique()) >= 4
    assert learner.method.backbone.training
    assert learner.matrix[-1][1].sum() > 36 / 6
