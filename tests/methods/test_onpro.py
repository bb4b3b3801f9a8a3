"""OnPro: the vector of its prototype loss, every part against loops or its own statement, and the card's invariants."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import assert_survives_kill, learner_for, make_store, run, split_scenario
from torch import Tensor
from torch.nn import functional as F

from clbench.errors import InputError
from clbench.evaluator import Schedule
from clbench.learner.hostreads import forbid_host_reads
from clbench.learner.learner import Learner
from clbench.methods.onpro import METHOD as ONPRO
from clbench.methods.onpro import instance_loss, mixed_cross_entropy, ope_loss, pair_counts, turned
from clbench.rng import generator
from clbench.scenarios.model import StreamDefaults
from clbench.stream.types import Batch, Cursor

OPE = json.loads((Path(__file__).parent / "fixtures" / "online_contrastive.json").read_text())["ope"]


def unit(*shape: int, key: int = 0) -> Tensor:
    return F.normalize(torch.randn(shape, generator=generator(0, "unit", key), dtype=torch.float64), dim=1)


# -- prototypes ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num_classes", [4, 9])
def test_prototype_loss_matches_the_vector_and_ignores_absent_classes(num_classes: int) -> None:
    first, second = (torch.tensor(OPE["inputs"][key], dtype=torch.float64) for key in ("z1", "z2"))
    loss, one, two = ope_loss(first, second, torch.tensor(OPE["inputs"]["y"]), num_classes, 0.5)
    assert loss.item() == pytest.approx(OPE["expected"]["loss"], abs=1e-6)  # the vector is float32
    for got, key in ((one, "proto1"), (two, "proto2")):
        expected = torch.tensor(OPE["expected"][key], dtype=torch.float64)
        torch.testing.assert_close(got[:4], expected, atol=1e-7, rtol=0)
        assert got[4:].numel() == 0 or got[4:].abs().max() == 0


def test_prototype_loss_of_one_class_is_zero_and_its_gradient_finite() -> None:
    first, second = unit(3, 4).requires_grad_(), unit(3, 4, key=1)
    loss, _, _ = ope_loss(first, second, torch.tensor([2, 2, 2]), 5, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert torch.isfinite(first.grad).all()


# -- instances -------------------------------------------------------------------------------------------------------
def instances_in_loops(similarity: Tensor, labels: list[float], temperature: float, plain: bool) -> float:
    size, half, eps = len(similarity), len(similarity) // 2, 1e-8
    labels = labels * 2
    cost = [[0.0] * size for _ in range(size)]
    for i in range(size):
        top = max(similarity[i].tolist())
        e = [math.exp((float(s) - top) / temperature) for s in similarity[i]]
        if not plain:
            e[i] = 0.0
        cost[i] = [-math.log(value / (sum(e) + eps) + eps) for value in e]
    by_class = 0.0
    for i in range(size):
        same = [j for j in range(size) if labels[j] == labels[i]]
        by_class += sum(cost[i][j] for j in same) / (len(same) + eps)
    if plain:
        return by_class / size
    return (2 * by_class + sum(cost[i][(i + half) % size] for i in range(size))) / size


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("labels", [[0.0, 1.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0.3, 0.7, 2.0, 0.3]])
def test_instance_loss_matches_the_loops(plain: bool, labels: list[float]) -> None:
    projected, features = unit(8, 5), unit(8, 5, key=1)
    similarity = projected @ features.T + projected @ projected.T
    got = instance_loss(similarity, torch.tensor(labels, dtype=torch.float64), 0.07, plain=plain)
    assert got.item() == pytest.approx(instances_in_loops(similarity, labels, 0.07, plain), abs=1e-9)


# -- variants --------------------------------------------------------------------------------------------------------
def turned_in_numpy(image: np.ndarray) -> list[np.ndarray]:
    """(C, S, S) -> its 16 variants: halves turned by 180 degrees, then the whole by 0, 180, 90, 270."""
    half = image.shape[2] // 2
    out = []
    for left, right in ((False, False), (True, False), (True, True), (False, True)):
        made = image.copy()
        if left:
            made[:, :, :half] = np.rot90(image[:, :, :half], 2, (1, 2))
        if right:
            made[:, :, half:] = np.rot90(image[:, :, half:], 2, (1, 2))
        out.append(made)
    return [np.rot90(made, turn, (1, 2)) for turn in (0, 2, 1, 3) for made in out]


def test_sixteen_different_variants_the_image_first() -> None:
    images = torch.rand(3, 2, 6, 6, generator=generator(0, "images"))
    variants = turned(images).view(16, 3, 2, 6, 6)
    assert torch.equal(variants[0], images)
    for i in range(3):
        expected = np.stack(turned_in_numpy(images[i].numpy()))
        assert np.array_equal(variants[:, i].numpy(), expected)
        assert len({variants[v, i].numpy().tobytes() for v in range(16)}) == 16
    assert torch.equal(turned(images, 4), turned(images)[:12])


# -- feedback --------------------------------------------------------------------------------------------------------
@settings(max_examples=50, deadline=None)
@given(st.integers(2, 8), st.integers(0, 70), st.integers(0, 10**6))
def test_counts_of_pairs_sum_to_the_total(num_known: int, total: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    means = torch.zeros(8, 4)
    known = torch.randperm(8, generator=rng)[:num_known]
    means[known] = F.normalize(torch.randn(num_known, 4, generator=rng), dim=1)
    pairs, counts = pair_counts(means, total, torch.rand(28, generator=rng))
    assert int(counts.sum()) == total
    assert (counts >= 0).all()
    used = counts > 0
    assert torch.isin(pairs[:, used], known).all(), "a class without a prototype"
    # proportional to softmax(1 / distance) but for rounding and one more or less
    open_pairs = torch.isin(pairs, known).all(0)
    share = torch.softmax(1 / torch.pdist(means[known.sort().values]), 0)
    assert (counts[open_pairs] - share * total).abs().max() <= 1.5 + 1e-4


@pytest.mark.parametrize("num_known", [0, 1])
def test_no_pairs_below_two_prototypes(num_known: int) -> None:
    means = torch.zeros(5, 3)
    means[:num_known] = 1.0
    assert pair_counts(means, 7, torch.rand(10, generator=generator(0, "u")))[1].sum() == 0


def test_equal_prototypes_do_not_break_the_counts() -> None:
    means = torch.ones(3, 4)
    means[2] = -1
    pairs, counts = pair_counts(means, 6, torch.rand(3, generator=generator(0, "u")))
    assert counts[(pairs[0] == 0) & (pairs[1] == 1)] == 6


def test_mixed_cross_entropy_is_the_soft_labels() -> None:
    logits, share = torch.randn(5, 4, generator=generator(0, "l")), torch.tensor([0.0, 0.2, 0.5, 1.0, 0.7])
    first, second = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 1, 0, 2, 3])
    soft = (1 - share)[:, None] * F.one_hot(first, 4) + share[:, None] * F.one_hot(second, 4)
    expected = -(soft * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(mixed_cross_entropy(logits, first, second, share), expected)


# -- the method ------------------------------------------------------------------------------------------------------
def tiny(**options: object) -> Learner:
    changes = {key: options.pop(key) for key in list(options) if key not in ("save", "checkpoint_steps", "schedule")}
    config = ONPRO.Config(**{"capacity": 20, "replay_batch_size": 6, "variants": 4, "projection": 8, **changes})
    scenario = split_scenario(make_store(), online=True)
    return learner_for(scenario, ONPRO, config=config, **options)


def advance(learner: Learner, tasks: int) -> None:
    """Steps of the first tasks, without the learner's books."""
    step = 0
    for plans in learner.plans()[:tasks]:
        for iteration in range(plans[0].iterations):
            learner.method.step(learner.stream.batch(plans[0], Cursor(plans[0].task, 0, iteration, 0, step)))
            step += 1


def batch_of(learner: Learner, task: int, iteration: int) -> Batch:
    plan = learner.plans()[task][0]
    return learner.stream.batch(plan, Cursor(task, 0, iteration, 0, 5 * task + iteration))


@pytest.mark.parametrize("changes", [{}, {"variants": 16, "base_rate": 0.5, "mixup_p": 1.0}])
def test_survives_a_kill(changes: dict) -> None:
    assert_survives_kill(partial(tiny, **changes), at_most=4)


def test_learns() -> None:
    """Without T, which would turn the tiny classes into each other, and with some passes."""
    scenario = split_scenario(make_store(), defaults=StreamDefaults(batch_size=5, epochs=8))
    config = ONPRO.Config(
        capacity=36, replay_batch_size=16, variants=4, projection=8, lr=0.02, augmentation=""
    )  # fmt: skip
    whole = run(learner_for(scenario, ONPRO, config=config, schedule=Schedule(0)))
    assert whole.matrix[-1][1].sum() > 2 * 36 / 6, "no better than chance"


def test_the_first_task_replays_from_its_second_batch_and_classifies_the_stream() -> None:
    learner = tiny()
    for iteration in range(2):
        batch = batch_of(learner, 0, iteration)
        inputs = learner.method.draw(batch)
        learner.method.keep(batch)
        assert inputs.replay is None
        assert (inputs.prototypes is None) == (iteration == 0)
        assert torch.equal(inputs.classified.first, batch.targets)
        assert len(inputs.classified.images) == len(batch.targets)
        assert len(inputs.stream) == 2 * 4 * len(batch.targets)
    assert torch.equal(inputs.stream[: len(batch.images)], batch.images)


def test_later_tasks_classify_the_replay_alone_and_mix_from_the_second_batch_on() -> None:
    learner = tiny(mixup_p=1.0, base_rate=0.5)
    advance(learner, 1)
    first, later = (learner.method.draw(batch_of(learner, 1, iteration)) for iteration in (0, 1))
    for inputs in (first, later):
        assert len(inputs.replay) == 2 * 4 * 6
        assert len(inputs.classified.first) == len(inputs.classified.images) == 6
        assert len(inputs.labels) == 4 * 6
        assert len(inputs.prototypes) == 12
    assert first.classified.share.abs().max() == 0
    assert later.classified.share.max() > 0
    mixed = later.classified
    labels = (1 - mixed.share.double()) * mixed.first + mixed.share.double() * mixed.second
    assert torch.equal(later.labels, torch.cat([labels + 6 * v for v in range(4)]))


@pytest.mark.parametrize(("task", "expected"), [(1, 4 * 2), (2, 10)])
def test_size_of_the_replay_batch_follows_the_classes_seen(task: int, expected: int) -> None:
    learner = tiny(replay_batch_size=10, replay_per_class=2)
    advance(learner, task)
    assert len(learner.method.draw(batch_of(learner, task, 1)).classified.first) == expected


def test_mixed_pairs_come_from_the_memory_and_their_classes() -> None:
    """Every image of a pair is (1 - share) of an exemplar of one class and share of one of another with a prototype."""
    learner = tiny(mixup_p=1.0, base_rate=0.0, replay_batch_size=12)
    advance(learner, 2)
    method = learner.method
    known = set((method.prototypes.abs().sum(1) > 0).nonzero()[:, 0].tolist())
    spare = method.buffer.sample(12, generator(0, "spare")).slots
    with forbid_host_reads():
        first, second, share = method._pairs(spare, generator(0, "pairs"))
    assert len(share) == 12
    held = dict(zip(method.buffer.rows.tolist(), method.buffer.targets.tolist(), strict=True))
    for side in (first, second):
        assert all(held[row] == target for row, target in zip(side.rows.tolist(), side.targets.tolist(), strict=True))
        assert set(side.targets.tolist()) <= known
    assert (first.targets != second.targets).all()
    assert ((share > 0) & (share < 1)).all()


def test_a_vanished_class_is_replaced_and_without_prototypes_exemplars_stay() -> None:
    learner = tiny(mixup_p=1.0)
    advance(learner, 2)
    method = learner.method
    spare = torch.arange(8)
    gone = int(method.buffer.targets[0])
    method.prototypes[5] = F.normalize(torch.ones(1, 8), dim=1)  # a prototype of a class that has no exemplar
    assert 5 not in method.buffer.targets.tolist()
    for key in range(20):
        first, second, _ = method._pairs(spare, generator(0, "pairs", key))
        assert 5 not in first.targets.tolist() + second.targets.tolist()
    method.prototypes.zero_()
    method.prototypes[gone] = 1.0
    first, second, share = method._pairs(spare, generator(0, "pairs"))
    assert torch.equal(first.slots, spare)
    assert torch.equal(second.slots, spare)
    assert share.abs().max() == 0


@pytest.mark.parametrize("base_rate", [0.0, 0.4, 0.9, 1.0])
def test_feedback_gives_as_many_as_were_drawn(base_rate: float) -> None:
    learner = tiny(base_rate=base_rate, mixup_p=0.5, replay_batch_size=10)
    advance(learner, 2)
    method = learner.method
    for step in range(20):
        held = method.buffer.sample(10, generator(0, "held", step))
        mix = method._feedback(held, method._read(held), step)
        assert len(mix.images) == len(mix.first) == len(mix.second) == len(mix.share) == 10
        even = mix.share[: int(10 * base_rate)]
        assert even.numel() == 0 or even.max() <= 0.6


def test_the_instance_weight_waits_for_the_second_task() -> None:
    ends = []
    for weight in (0.1, 1.0):
        learner = tiny(ins_weight=weight, schedule=Schedule(0))
        with torch.random.fork_rng([]):
            advance(learner, 1)
            after_one = learner.method.classifier.weight.detach().clone()
            learner.method.step(batch_of(learner, 1, 0))
        ends.append((after_one, learner.method.backbone.layer.weight))
    assert torch.equal(ends[0][0], ends[1][0])
    assert not torch.equal(ends[0][1], ends[1][1])


def test_features_of_fewer_columns_than_the_projection_are_used_whole() -> None:
    learner = run(tiny(projection=500, schedule=Schedule(0)))
    assert learner.method.projection.out_features == 16


def test_images_that_cannot_be_turned_are_refused() -> None:
    scenario = split_scenario(make_store(), online=True)
    with pytest.raises(InputError, match="changes the size"):
        learner_for(scenario, ONPRO, config=ONPRO.Config(augmentation="center_crop(4)"))
    store = make_store()
    oblong = replace(store, images=store.images[..., :4].contiguous())
    with pytest.raises(InputError, match="turns images by 90 degrees, but they are 6 x 4"):
        learner_for(scenario, ONPRO, store=oblong)
