"""SCR: its loss against the card's formula in loops, the nearest mean against the vector, the review, and the cache of
the means."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PER_CLASS, assert_survives_kill, learner_for, make_store, run, split_scenario
from torch import Tensor, nn

from clbench.evaluator import Schedule
from clbench.evaluator.evaluator import watching
from clbench.learner.hostreads import forbid_host_reads
from clbench.learner.learner import Learner
from clbench.methods._exemplar_means import NEVER, exemplar_means, mean_scores, squared_distances
from clbench.methods.scr import METHOD as SCR
from clbench.methods.scr import supcon_loss
from clbench.rng import generator
from clbench.stream.types import Cursor

NCM = json.loads((Path(__file__).parent / "fixtures" / "online_contrastive.json").read_text())["ncm"]
exact = partial(torch.testing.assert_close, atol=1e-9, rtol=0)


def supcon_in_loops(first: Tensor, second: Tensor, targets: list[int], temperature: float) -> float:
    """The card's formula, one anchor and one positive at a time."""
    z = [row / row.norm() for row in torch.cat([first, second])]
    y = targets * 2
    total = 0.0
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        denominator = math.log(sum(math.exp(float(z[i] @ z[a]) / temperature) for a in others))
        positives = [p for p in others if y[p] == y[i]]
        total -= sum(float(z[i] @ z[p]) / temperature - denominator for p in positives) / len(positives)
    return total / len(z)


# -- the loss --------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 3), min_size=1, max_size=7), st.sampled_from([0.07, 0.1, 1.0]))
def test_supcon_matches_the_formula(seed: int, targets: list[int], temperature: float) -> None:
    """Batches with one class and classes with one sample among them."""
    rng = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(len(targets), 5, generator=rng, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor(targets)
    value = supcon_loss(first, second, labels, temperature)
    assert value.item() == pytest.approx(supcon_in_loops(first, second, targets, temperature), abs=1e-9)
    longer = supcon_loss(3 * first, 0.2 * second, labels, temperature)
    assert longer.item() == pytest.approx(value.item(), abs=1e-9), "depends on the length of the features"
    swapped = supcon_loss(second.flip(0), first.flip(0), labels.flip(0), temperature)
    assert swapped.item() == pytest.approx(value.item(), abs=1e-9), "depends on the order of views or images"


def test_supcon_pulls_classes_together() -> None:
    z = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 1]]
    apart = torch.eye(4, dtype=torch.float64)
    y = torch.tensor([0, 0, 1, 1])
    assert supcon_loss(z, z, y, 0.1) < supcon_loss(apart, apart, y, 0.1)
    one = torch.randn(1, 3, generator=generator(0, "z"))
    assert supcon_loss(one, one, torch.tensor([4]), 0.1).item() == pytest.approx(0.0, abs=1e-6)


# -- the nearest mean ------------------------------------------------------------------------------------------------
def test_nearest_mean_matches_the_vector() -> None:
    given_, expected = NCM["inputs"], NCM["expected"]
    features, query = (torch.tensor(given_[key], dtype=torch.float64) for key in ("exemplar_feats", "query"))
    means, counts = exemplar_means(features, torch.tensor(given_["labels"]), 3)
    exact(means, torch.tensor(expected["means"], dtype=torch.float64))
    assert counts.tolist() == [2, 2, 2]
    exact(squared_distances(query, means), torch.tensor(expected["dist"], dtype=torch.float64))
    unit = query / query.norm(dim=1, keepdim=True)
    scores = mean_scores(unit, means, torch.ones(3, dtype=torch.bool))
    assert scores.argmax(1).tolist() == expected["pred"]
    exact(2 - 2 * scores, squared_distances(query, means))


def test_a_class_without_exemplars_has_mean_zero_and_one_unseen_never_answers() -> None:
    means, counts = exemplar_means(torch.eye(3), torch.tensor([0, 0, 2]), 4)
    assert counts.tolist() == [2, 0, 1, 0]
    assert means[[1, 3]].abs().max() == 0
    scores = mean_scores(torch.eye(3), means, torch.tensor([True, True, False, True]))
    assert (scores[:, 2] <= NEVER + 1).all()
    assert scores[:, [0, 1, 3]].min() >= -1


# -- the method ------------------------------------------------------------------------------------------------------
def tiny(*, epochs: bool = False, schedule: Schedule | None = None, **options: object) -> Learner:
    changes = {key: options.pop(key) for key in list(options) if key not in ("save", "checkpoint_steps")}
    config = SCR.Config(**{"lr": 0.05, "capacity": 20, "replay_batch_size": 6, "projection": 8, **changes})
    scenario = split_scenario(make_store(), online=not epochs)
    if schedule is not None:
        options["schedule"] = schedule
    return learner_for(scenario, SCR, config=config, views={"train": "flip", "test": ""}, **options)


@pytest.mark.parametrize("epochs", [False, True])
def test_survives_a_kill(epochs: bool) -> None:
    whole = assert_survives_kill(partial(tiny, epochs=epochs), at_most=6)
    assert whole.method.version == whole.at.step


def weights(learner: Learner) -> list[Tensor]:
    return [value.clone() for module in learner.method.modules() for value in module.state_dict().values()]


def test_nothing_is_learned_before_the_memory_holds_something() -> None:
    learner = tiny()
    method, plan = learner.method, learner.plans()[0][0]
    changed = []
    for iteration in range(2):
        before = weights(learner)
        losses = method.step(learner.stream.batch(plan, Cursor(0, 0, iteration, 0, iteration)))
        changed.append(any(not torch.equal(a, b) for a, b in zip(before, weights(learner), strict=True)))
        assert len(method.buffer) == 5 * (iteration + 1)
        assert bool(losses) == changed[-1]
    assert changed == [False, True]


def test_views_are_memory_then_stream_raw_and_augmented() -> None:
    learner = learner_for(
        split_scenario(make_store(), online=True), SCR, config=SCR.Config(capacity=20, replay_batch_size=3),
        views={"train": "flip(1)", "test": ""},
    )  # fmt: skip
    plan = learner.plans()[0][0]
    for iteration in range(2):
        batch = learner.stream.batch(plan, Cursor(0, 0, iteration, 0, iteration))
        views = learner.method.draw(batch)
        learner.method.keep(batch)
    assert torch.equal(views.raw.flip(3), views.augmented)
    assert torch.equal(views.raw[3:], learner.stream.read(batch.rows, None, "test"))
    assert torch.equal(views.targets[3:], batch.targets)
    store = learner.stream.read.store
    known = {image.numpy().tobytes(): int(label) for image, label in zip(store.images, store.labels, strict=True)}
    for image, target in zip(views.raw[:3], views.targets[:3], strict=True):
        assert known[(image * 255).round().to(torch.uint8).numpy().tobytes()] == target


def test_review_passes_over_the_memory_once_with_a_tenth_of_the_gradient() -> None:
    learner = tiny(schedule=Schedule(0))
    plans = learner.plans()[0]
    assert [(p.phase.name, p.iterations) for p in plans] == [("train", 5), ("review", 3)]
    method = learner.method
    for iteration in range(plans[0].iterations):
        method.step(learner.stream.batch(plans[0], Cursor(0, 0, iteration, 0, iteration)))
    assert len(method.buffer) == 20
    drawn, held = [], method.buffer.rows.clone()
    take = method.buffer.take
    method.buffer.take = lambda slots: (drawn.append(slots), take(slots))[1]
    for iteration in range(3):
        before = {id(p): p.detach().clone() for p in [*method.backbone.parameters(), *method.projection.parameters()]}
        method.step(learner.stream.batch(plans[1], Cursor(0, 1, iteration, 0, 5 + iteration)))
        for p in [*method.backbone.parameters(), *method.projection.parameters()]:
            torch.testing.assert_close(before[id(p)] - p, 0.05 * p.grad, atol=1e-7, rtol=1e-4)
    slots = torch.cat(drawn)
    assert len(slots) == len(slots.unique()) == 18, "an exemplar twice, or the ragged last batch kept"
    assert torch.equal(method.buffer.rows, held), "the review changed the memory"

    views = method.draw(learner.stream.batch(plans[1], Cursor(0, 1, 0, 0, 5)))
    full = [torch.autograd.grad(supcon(method, views), list(method.projection.parameters()))][0]
    method.optimizer.zero_grad()
    method.update(views)
    # the update has moved the weights, not the gradients it used
    for gradient, parameter in zip(full, method.projection.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient / 10, atol=1e-7, rtol=1e-4)


def supcon(method: SCR, views: object) -> Tensor:
    first, second = (method.projection(method.backbone(view)) for view in (views.raw, views.augmented))
    return supcon_loss(first, second, views.targets, method.config.temperature)


def test_review_does_nothing_beyond_what_the_memory_holds_and_can_be_left_out() -> None:
    large = run(tiny(capacity=200, schedule=Schedule(0)))  # 3 tasks of 24 samples in 5 batches
    assert len(large.method.buffer) == 72
    assert [plans[1].iterations for plans in large.plans()] == [33, 33, 33]
    steps, _, _ = large.losses.table()
    assert len(steps) == 3 * 5 - 1 + sum(24 * (task + 1) // 6 for task in range(3))
    assert [len(plans) for plans in tiny(review=False).plans()] == [1, 1, 1]
    assert [len(plans) for plans in tiny(capacity=5).plans()] == [1, 1, 1], "less than one batch of memory"


def test_means_are_computed_once_per_observation_not_once_per_chunk() -> None:
    learner = tiny()
    learner.evaluator.chunk = 4  # 12 test images per group: many chunks
    run(learner)
    observed = {point[0] for point in learner.evaluator.points}
    assert len(observed) == learner.at.step + 1  # before the first step and behind each
    assert learner.method._means.computed == len(observed)


def test_means_are_those_of_the_memory_as_the_network_sees_it_now() -> None:
    learner = run(tiny(schedule=Schedule(0)))
    method, reader = learner.method, learner.stream.read
    images = reader(torch.arange(30), None, "test")
    with watching(method):
        scores = method.logits(images, torch.ones(6, dtype=torch.bool), None)
        exemplars = method.backbone(reader(method.buffer.rows, None, "test"))
        queries = method.backbone(images)
    for c in method.buffer.targets.unique().tolist():
        unit = exemplars[method.buffer.targets == c]
        mean = (unit / unit.norm(dim=1, keepdim=True)).mean(0)
        expected = (queries / queries.norm(dim=1, keepdim=True)) @ (mean / mean.norm())
        torch.testing.assert_close(scores[:, c], expected, atol=1e-5, rtol=0)


def test_a_class_without_exemplars_answers_with_a_direction_of_this_version() -> None:
    learner = tiny()
    method = learner.method
    method.seen.fill_(True)
    features = torch.eye(16)
    allowed = torch.ones(6, dtype=torch.bool)
    with forbid_host_reads():
        first = method.classify(features, allowed, None)
        again = method.classify(features, allowed, None)
        method.version += 1
        later = method.classify(features, allowed, None)
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    torch.testing.assert_close(first.square().sum(0), torch.ones(6))  # directions


def test_a_loaded_checkpoint_forgets_the_means() -> None:
    learner = run(tiny(schedule=Schedule(0)))
    method = learner.method
    other = run(learner_for(split_scenario(make_store(), online=True), SCR, seed=5, schedule=Schedule(0),
                            config=method.config, views={"train": "flip", "test": ""}))  # fmt: skip
    images = learner.stream.read(torch.arange(9), None, "test")
    allowed = torch.ones(6, dtype=torch.bool)
    with watching(method), watching(other.method):
        theirs = other.method.logits(images, allowed, None)
        assert method.version == other.method.version
        method.logits(images, allowed, None)
        method.load_state_dict(other.method.state_dict())
        assert torch.equal(method.logits(images, allowed, None), theirs)


def test_learns() -> None:
    whole = run(tiny(schedule=Schedule(0), lr=0.2, capacity=3 * PER_CLASS))
    assert whole.matrix[-1][1].sum() > 2 * 36 / 6, "no better than chance"


class WithNorm(nn.Module):
    """A backbone with batch norm: watching must not touch its statistics, though the memory passes through it."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(36, 8), nn.BatchNorm1d(8)

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.norm(self.layer(images.flatten(1))))


def test_watching_leaves_batch_norm_alone() -> None:
    states = []
    for every in (0, 1):
        learner = learner_for(
            split_scenario(make_store(), online=True), SCR, backbone=WithNorm, schedule=Schedule(every),
            config=SCR.Config(capacity=20, replay_batch_size=6), views={"train": "flip", "test": ""},
        )  # fmt: skip
        states.append(run(learner).method.backbone.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
