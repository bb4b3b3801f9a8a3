"""PL-FMS: the numbers of the hle card, what must hold for heads, memory and pseudo-labels, and the whole method."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TEST_PER_CLASS, assert_survives_kill, equal, learner_for, make_store, outcome, run, split_scenario
from torch import Tensor, nn

from clbench.data.classes import ClassTable
from clbench.errors import InputError
from clbench.learner.graphed_step import check_graphable
from clbench.learner.learner import Learner
from clbench.memory.importance import NEVER
from clbench.methods._importance_replay import Prepared
from clbench.methods.clib import METHOD as CLIB
from clbench.methods.plfms import (
    METHOD as PLFMS,
)
from clbench.methods.plfms import (
    compose,
    frequent_label,
    pseudo_labels,
    relatives,
    use_probability,
)
from clbench.scenarios.model import Group, Scenario, StreamDefaults, Task
from clbench.stream.types import Batch, Cursor, Phase

SMALL = {"capacity": 12, "replay_batch_size": 5, "importance_every": 2, "lr_period": 1, "lr_length": 3, "lr": 0.01}
FINE, COARSE = range(6), (6, 7)
PARENT = [6, 6, 6, 7, 7, 7, -1, -1]


def hierarchy() -> Scenario:
    """Dual label, by hand: all images as class 6 or 7, then again as 0..2 and 3..5."""
    flat = split_scenario(make_store(), tasks=2)
    rows = torch.cat([task.rows for task in flat.tasks])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(3))]
    parent = torch.tensor(PARENT)
    fine = torch.cat([task.targets for task in flat.tasks])[
        torch.cat([task.rows for task in flat.tasks]).argsort()[rows.argsort().argsort()]
    ]
    tasks = [Task(rows, parent[fine], torch.tensor(COARSE))]
    groups = []
    for index, task in enumerate(flat.tasks):
        tasks.append(Task(task.rows, task.targets, task.classes))
        groups.append(flat.groups[index]._replace(classes=torch.tensor(FINE), task=index + 1, level=1))
    for coarse in COARSE:
        test = flat.groups[coarse - 6].rows
        targets = torch.full((3 * TEST_PER_CLASS,), coarse)
        groups.append(Group(f"coarse {coarse}", test, targets, torch.tensor(COARSE), task=0))
    half = len(rows) // 2
    first_seen = torch.tensor([2 * half] * 3 + [3 * half] * 3 + [0, 0])
    names = tuple(f"class {c}" for c in range(8))
    return Scenario(
        id="tiny-hle@1", datasets=("tiny",), setting="class", tasks=tuple(tasks), groups=tuple(groups),
        classes=ClassTable(names, torch.tensor([1] * 6 + [0] * 2), parent), first_seen=first_seen, online=True,
        defaults=StreamDefaults(batch_size=5, updates_per_batch=2),
    )  # fmt: skip


def learner(method=PLFMS, scenario: Scenario | None = None, **changes) -> Learner:
    config = method.Config(**{**SMALL, **changes})
    return learner_for(scenario or hierarchy(), method, store=make_store(), config=config)


def batch_of(made: Learner, targets: list[int], seen: Tensor | None = None, step: int = 0) -> Batch:
    number = len(targets)
    rows = torch.arange(number)
    return Batch(
        made.stream.read(rows, None, "train"), torch.tensor(targets), rows, None,
        torch.ones(8, dtype=torch.bool) if seen is None else seen, Cursor(0, 0, 0, 0, step), Phase("train"), 0,
    )  # fmt: skip


# -- flexible memory sampling (card 1, FMS; card 6) --------------------------------------------------------------------
def test_the_ramp_has_the_cards_lengths() -> None:
    """Single-label CIFAR, Z = 50000, 20 classes: in full use after 2500 samples; dual label 5000; multi-depth 2 Z."""
    elapsed = torch.tensor([0, 1250, 2500, 2501, 40000])
    assert use_probability(elapsed, 20, 50000).tolist() == [0, 0.5, 1, 1, 1]
    assert use_probability(elapsed, 20, 100000).tolist() == pytest.approx([0, 0.25, 0.5, 0.5002, 1])
    assert use_probability(elapsed, 20, 2.0 * 50000).tolist() == pytest.approx([0, 0.25, 0.5, 0.5002, 1])
    assert use_probability(elapsed, 40, 50000).tolist() == pytest.approx([0, 1, 1, 1, 1]), "more classes, faster ramp"


@given(st.lists(st.booleans(), min_size=1, max_size=10), st.integers(0, 20), st.integers(1, 20))
@settings(deadline=None)
def test_a_batch_is_used_samples_then_exemplars(used: list[bool], drawn: int, size: int) -> None:
    order, valid = compose(torch.tensor(used), drawn, size)
    assert len(order) == len(valid) == min(size, len(used) + drawn)
    assert len(set(order.tolist())) == len(order)
    counted = order[valid].tolist()
    stream = [index for index, use in enumerate(used) if use]
    wanted = stream + list(range(len(used), len(used) + drawn))
    assert counted == wanted[:size]
    assert valid.sum() == min(size, sum(used) + drawn)


def test_a_new_class_waits_and_the_first_batch_does_not() -> None:
    made = learner(stream_length=1000)
    method = made.method
    first = batch_of(made, [6, 6, 7, 6, 7])
    method.memory.add(first.rows, first.targets)
    assert method.used(first).all()
    later = batch_of(made, [0, 6, 0, 6, 0], step=1)
    method.memory.add(later.rows, later.targets)
    # 10 samples seen, class 0 first as number 5, class 6 as number 0; 3 classes: 4 * 3 / 1000 and 9 * 3 / 1000
    draws = torch.stack([method.used(later._replace(at=Cursor(0, 0, 0, 0, step))) for step in range(1000)]).double()
    assert draws.mean(0).tolist() == pytest.approx([0.012, 0.027, 0.012, 0.027, 0.012], abs=0.02)
    method._length = 1e-3
    assert method.used(later).all()


def test_skipped_samples_are_filled_up_from_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an endless ramp the stream is never used behind the first batch: all ten come from the memory."""
    made, seen = learner(stream_length=10**12, cutmix=0.0), []

    def watched(self: PLFMS, images: Tensor, targets: Tensor, batch: Batch, valid: Tensor) -> Prepared:
        held = self.setting.read(self.memory.rows, None, "test")
        assert all((held == image).flatten(1).all(1).any() for image in images[valid])
        seen.append((len(images), int(valid.sum())))
        return CLIB.prepared(self, images, targets, batch, valid)

    monkeypatch.setattr(PLFMS, "prepared", watched)
    run(made)
    # first batch: 5 of the stream and the 5 exemplars, which are the same samples; then 10 each, 7 and 6 at ragged ends
    assert seen[:2] == [(10, 10), (10, 10)]
    assert {pair for pair in seen if pair[0] != pair[1]} == set()


def test_a_small_memory_gives_a_smaller_batch() -> None:
    made = learner(capacity=2, stream_length=10**12, cutmix=0.0)
    batch = batch_of(made, [6, 7, 6, 7, 6])
    made.method.step(batch)
    made.method.step(batch._replace(at=Cursor(0, 0, 0, 1, 1)))  # the rule is still off
    assert int(made.method.memory._draws.sum()) == 0, "the refresh of the second update takes the draws over"
    later = batch_of(made, [0, 0, 1, 1, 0], step=2)
    made.method.step(later)
    assert int(made.method.memory._draws.sum()) == 2


# -- heads -----------------------------------------------------------------------------------------------------------
def test_a_sample_reaches_the_head_of_its_own_level_only() -> None:
    """Card 6: a sample with level h gives zero gradient to heads h' != h, mixed by CutMix or not."""
    for targets, own, other in (([6, 7, 6], COARSE, FINE), ([0, 3, 5], FINE, COARSE)):
        made = learner(cutmix=1.0)
        method = made.method
        batch = batch_of(made, targets)
        weight = method.classifier.weight
        before = weight.detach().clone()
        method.update(method.prepared(batch.images, batch.targets, batch))
        moved = (weight.detach() - before).abs().sum(1)
        assert moved[list(other)].max() == 0
        assert moved[list(own)].max() > 0


def test_cutmix_stays_on_a_level() -> None:
    """A mixed target of another level would have an infinite loss."""
    made = learner(cutmix=1.0)
    for step in range(8):
        batch = batch_of(made, [6, 0, 7, 3, 1, 6], step=step)
        made.method.memory.add(batch.rows, batch.targets)
        losses = made.method.update(made.method.prepared(batch.images, batch.targets, batch))
        assert torch.isfinite(losses["loss"])


@pytest.mark.parametrize("growth", ["keep", "bias", "reset"])
def test_head_growth(growth: str) -> None:
    """Class 3 appears: the head of its level stays, or loses its biases, or all; the coarse head is not touched."""
    made = learner(head_growth=growth)
    method = made.method
    first = batch_of(made, [6, 0, 7, 1, 6])
    method.grow_heads(first)
    method.memory.add(first.rows, first.targets)
    weight, bias = method.classifier.weight.detach().clone(), method.classifier.bias.detach().clone()
    method.grow_heads(batch_of(made, [6, 0, 7, 1, 6], step=1))
    assert torch.equal(method.classifier.weight, weight), "no class is new"
    assert torch.equal(method.classifier.bias, bias), "no class is new"
    method.grow_heads(batch_of(made, [3, 0, 7, 1, 6], step=2))
    same_weight = (method.classifier.weight == weight).all(1).tolist()
    same_bias = (method.classifier.bias == bias).tolist()
    assert same_weight == [growth != "reset"] * 6 + [True] * 2
    assert same_bias == [growth == "keep"] * 6 + [True] * 2
    assert method.classifier.weight.abs().max() <= 1 / 4  # 1 / sqrt(16 features), as a fresh layer's


# -- memory and pseudo-labels ----------------------------------------------------------------------------------------
def test_coarse_and_fine_are_classes_of_their_own() -> None:
    made = run(learner())
    memory = made.method.memory
    assert len(memory) == memory.capacity
    assert memory.counts.tolist() == torch.bincount(memory.targets, minlength=8).tolist()
    assert memory.num_seen == made.scenario.offsets[-1]


def test_relatives_are_ancestors_and_descendants() -> None:
    #      0 1 under 4, 2 3 under 5, 4 5 under 6
    kin = relatives(torch.tensor([4, 4, 5, 5, 6, 6, -1]))
    assert kin.tolist() == kin.T.tolist()
    assert [row.nonzero()[:, 0].tolist() for row in kin] == [
        [4, 6], [4, 6], [5, 6], [5, 6], [0, 1, 6], [2, 3, 6], [0, 1, 2, 3, 4, 5],
    ]  # fmt: skip


def test_pseudo_labels_are_the_likeliest_allowed_ones() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0], [9.0, 3.0, 2.0], [1.0, 1.0, 1.0]])
    allowed = torch.tensor([[False, True, True], [False, True, True], [False, False, False]])
    assert pseudo_labels(logits, allowed).tolist() == [2, 1, -1]


def test_the_most_frequent_label_wins() -> None:
    targets, labels = torch.tensor([3, 3, 3, 0, 2, 2]), torch.tensor([1, 2, 2, -1, 1, 0])
    assert frequent_label(targets, labels, 4).tolist() == [0, 1, 0, 2]


def test_a_coarse_class_is_related_to_the_fine_one_its_exemplars_look_like() -> None:
    method = learner().method
    rows = torch.arange(6)
    method.memory.add(rows, torch.tensor([6, 6, 6, 7, 1, 4]))
    logits = torch.zeros(6, 8)
    logits[:3, 1] = 5.0  # exemplars of class 6 look like its child 1, and even more like 4, which is none of its own
    logits[:3, 4] = 9.0
    logits[3, 3] = 7.0  # class 3 hasn't come yet
    method.measured(logits, method.memory.targets, torch.ones(8, dtype=torch.bool))
    level_0, level_1 = method.related.T.tolist()
    assert level_1[6:] == [1, 4]
    assert [level_0[c] for c in (1, 4)] == [6, 7]
    assert level_0[2] == 2, "a class without exemplars stands for itself"


def test_pseudo_labels_widen_who_loses() -> None:
    """The largest class is 6; its exemplars look like class 1, which holds the least important one."""
    rows = {}
    for variant in ("paper", "released"):
        method = learner(variant=variant, capacity=6).method
        method.memory.add(torch.arange(6), torch.tensor([6, 6, 6, 7, 1, 4]))
        method.memory._importance.copy_(torch.tensor([0.5, 0.4, 0.6, -1.0, 0.1, -1.0]))
        logits = torch.zeros(6, 8)
        logits[:3, 1] = 5.0
        method.measured(logits, method.memory.targets, torch.ones(8, dtype=torch.bool))
        related = method.related if variant == "paper" else None
        method.memory.add(torch.tensor([50]), torch.tensor([7]), related=related)
        rows[variant] = method.memory.rows.tolist()
    assert rows == {"paper": [0, 1, 2, 3, 50, 5], "released": [0, 50, 2, 3, 4, 5]}


def test_the_variants_differ_and_only_on_a_tree() -> None:
    def weights(scenario: Scenario, variant: str) -> Tensor:
        made = learner(scenario=scenario, variant=variant, capacity=8)
        return run(made).method.classifier.weight.detach()

    tree, flat = hierarchy(), split_scenario(make_store(), online=True)
    assert not torch.equal(weights(tree, "paper"), weights(tree, "released"))
    assert torch.equal(weights(flat, "paper"), weights(flat, "released"))


# -- the method ------------------------------------------------------------------------------------------------------
def test_the_stream_is_as_long_as_the_scenario_says() -> None:
    made = learner()
    assert made.method._length == made.scenario.offsets[-1] == 2 * 72
    assert learner(ramp=2.0).method._length == 2 * 2 * 72


@pytest.mark.parametrize(
    "changes", [{}, {"variant": "released", "head_growth": "reset", "importance_rule": "intended"}]
)
def test_survives_a_kill(changes: dict) -> None:
    make = partial(learner_for, hierarchy(), PLFMS, store=make_store(), config=PLFMS.Config(**{**SMALL, **changes}))
    whole = assert_survives_kill(make, at_most=5)
    assert (whole.method.memory.met < NEVER).all()


def test_the_update_may_be_captured() -> None:
    """Its parts from inputs that stay where they are, as a CUDA graph has them, give the same run."""
    check_graphable(PLFMS, "it")
    plain, captured = learner(), learner()
    captured.cuda_graph = True
    assert equal(outcome(run(plain)), outcome(run(captured)))


def test_it_learns_both_levels() -> None:
    """On separable lines, far above chance (1/2 and 1/6) behind the last task."""
    made = run(learner(capacity=60, lr=0.02, cutmix=0.0, variant="paper"))
    hits = made.matrix[-1][1].double()
    sizes = torch.tensor([len(group.rows) for group in made.scenario.groups])
    accuracy = hits / sizes
    assert accuracy[:2].mean() > 0.6
    assert accuracy[2:].mean() > 0.8


def test_a_stream_without_memory_is_refused() -> None:
    with pytest.raises(InputError, match="plfms trains on its memory, but capacity is 0"):
        learner(capacity=0)


def test_an_empty_first_task() -> None:
    scenario = hierarchy()
    empty = torch.empty(0, dtype=torch.int64)
    tasks = (Task(empty, empty, empty), *scenario.tasks)
    groups = tuple(group._replace(task=group.task + 1) for group in scenario.groups)
    run(learner(scenario=replace(scenario, tasks=tasks, groups=groups)))


def test_a_batch_of_one_class() -> None:
    made = learner(cutmix=1.0)
    losses = made.method.step(batch_of(made, [6, 6, 6, 6, 6]))
    assert torch.isfinite(losses["loss"])


def test_norms_keep_their_mode_as_losses_are_measured() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8))
            self.num_features = 8

        def forward(self, images: Tensor) -> Tensor:
            return self.layers(images)

    made = learner_for(hierarchy(), PLFMS, store=make_store(), backbone=Normed, config=PLFMS.Config(**SMALL))
    made.method.step(batch_of(made, [6, 7, 6, 7, 6]))
    norm = made.method.backbone.layers[2]
    counted = int(norm.num_batches_tracked)
    made.method.refresh(torch.ones(8, dtype=torch.bool))
    assert norm.training
    assert int(norm.num_batches_tracked) == counted
