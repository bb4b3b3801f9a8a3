"""Hits against a naive count, for all masks, groups and ties; features cached only where they may be."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EVERY_STEP, Flat, learner_for, make_store, run, split_scenario
from torch import Tensor, nn

from clbench.errors import InputError, RunFailed
from clbench.evaluator import Schedule, subset
from clbench.evaluator.engine import EngineName, make_engine
from clbench.evaluator.evaluator import answer, watching
from clbench.evaluator.subset import draw_subset
from clbench.methods.base import Method
from clbench.methods.finetune import Finetune
from clbench.rng import generator
from clbench.scenarios.model import Domains, Scenario


def answer_reference(logits: Tensor, targets: Tensor, allowed: Tensor) -> list[bool]:
    """One row at a time: the first of the largest allowed logits."""
    right = []
    for row, target, may in zip(logits.tolist(), targets.tolist(), allowed.tolist(), strict=True):
        best, best_value = None, None
        for c, (value, on) in enumerate(zip(row, may, strict=True)):
            if on and (best is None or value > best_value):
                best, best_value = c, value
        right.append(best == target)
    return right


@settings(max_examples=200)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 3), st.integers(0, 10_000))
def test_answer_matches_the_naive_count(rows: int, classes: int, kind: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randint(-2, 3, (rows, classes), generator=rng).float()  # many exact ties
    targets = torch.randint(0, classes, (rows,), generator=rng)
    allowed = torch.rand((rows, classes), generator=rng) < 0.5
    if kind == 0:
        allowed = torch.ones_like(allowed)
    elif kind == 1:
        allowed = allowed[:1].expand(rows, -1)
    mask = None if kind == 0 else allowed[0] if kind == 1 else allowed
    predicted, right = answer(logits, targets, mask)
    assert right.tolist() == answer_reference(logits, targets, allowed)
    assert predicted.shape == (rows,)


def naive_hits(learner, step_method, groups, position: int, mask: str) -> list[int]:
    """Every group on its own, every image on its own."""
    scenario, evaluator = learner.scenario, learner.evaluator
    hits = []
    for index in groups:
        start, end = evaluator.subset.starts[index], evaluator.subset.starts[index + 1]
        count = 0
        for slot in range(start, end):
            row, target = evaluator.subset.rows[slot], int(evaluator.subset.targets[slot])
            allowed = torch.zeros(scenario.num_classes, dtype=torch.bool)
            allowed[scenario.groups[index].classes] = True
            if mask == "seen":
                allowed &= scenario.first_seen < position
            if mask == "task":
                own = torch.zeros_like(allowed)
                own[scenario.tasks[scenario.groups[index].task].classes] = True
                allowed &= own
            with watching(step_method):
                logits = step_method.logits(learner.stream.read(row[None], None, "test"), allowed, None)[0]
            logits[~allowed] = -torch.inf
            count += int(logits.argmax()) == target
        hits.append(count)
    return hits


@pytest.mark.parametrize("mask", ["seen", "all", "task"])
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_hits_equal_the_naive_evaluation(mask: str, chunk: int) -> None:
    learner = learner_for(split_scenario(make_store()), Finetune, mask=mask, schedule=Schedule(5))
    learner.evaluator.chunk = chunk
    run(learner)
    drained = learner.evaluator.drain()
    last = len(drained["points"]) - 1
    position = learner.scenario.offsets[-1]
    expected = naive_hits(learner, learner.method, (0, 1, 2), position, mask)
    assert drained["hits"][last].tolist() == expected
    full = learner.evaluator.full(learner.method, position)
    assert full.hits.tolist() == expected, "the subsets are whole groups here, so both must agree"
    assert len(full.predictions) == sum(len(g.rows) for g in learner.scenario.groups)


@pytest.mark.parametrize("mask", ["seen", "all", "task"])
@pytest.mark.parametrize("chunk", [3, 512])
def test_hits_of_groups_that_do_not_lie_in_a_row(mask: str, chunk: int) -> None:
    scenario = split_scenario(make_store())
    scenario = dataclasses.replace(scenario, groups=tuple(scenario.groups[g] for g in (0, 2, 1)))
    learner = run(learner_for(scenario, Finetune, mask=mask))
    evaluator, position = learner.evaluator, scenario.offsets[2]
    evaluator.chunk = chunk
    assert evaluator.active_groups(1, position) == (0, 2)
    evaluator.observe(learner.method, 1, 0, 999, position)
    hits = evaluator.drain(len(evaluator.points) - 1)["hits"][0].tolist()
    first, last = naive_hits(learner, learner.method, (0, 2), position, mask)
    assert hits == [first, 0, last]
    assert sum(hits) > 0


def with_domains(scenario: Scenario) -> Scenario:
    """Test images under two permutations of their pixels."""
    table = torch.stack([torch.arange(36), torch.randperm(36, generator=generator(0, "pixels"))])
    groups = tuple(group._replace(domain=torch.arange(len(group.rows)) % 2) for group in scenario.groups)
    return dataclasses.replace(scenario, groups=groups, domains=Domains("permutation", table))


@pytest.mark.parametrize("kind", ["class", "task", "pixels"])
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1)])
@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_images_that_do_not_fit_are_read_again(kind: str, order: tuple, chunk: int, monkeypatch) -> None:
    scenario = split_scenario(make_store())
    scenario = dataclasses.replace(
        scenario, groups=tuple(scenario.groups[g] for g in order), setting="task" if kind == "task" else "class"
    )
    scenario = with_domains(scenario) if kind == "pixels" else scenario
    drained = []
    for room in (subset.IMAGE_CACHE_BYTES, 0):
        monkeypatch.setattr(subset, "IMAGE_CACHE_BYTES", room)
        learner = learner_for(scenario, Finetune, schedule=EVERY_STEP)
        learner.evaluator.chunk = chunk
        run(learner)
        assert (learner.evaluator._images._images is None) == (room == 0)
        drained.append(learner.evaluator.drain())
    assert int(drained[0]["hits"].sum()) > 0
    assert torch.equal(drained[0]["hits"], drained[1]["hits"])


def test_domains_of_some_groups_only_are_refused() -> None:
    groups = list(with_domains(split_scenario(make_store())).groups)
    groups[1] = groups[1]._replace(domain=None)
    with pytest.raises(InputError, match=f"group '{groups[1].name}' does not say the domain"):
        draw_subset(tuple(groups), 5, 0, torch.device("cpu"))
    nothing = torch.zeros(0, dtype=torch.int64)
    groups[0] = groups[0]._replace(rows=nothing, targets=nothing, domain=nothing)
    assert draw_subset(tuple(groups[:2]), 5, 0, torch.device("cpu")).domain is None, "no rows, no domains"


class Darkens(Finetune):
    """Halves the pixels it is given instead of a copy of them."""

    def logits(self, images: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        return super().logits(images.mul_(0.5), allowed, task)


@pytest.mark.parametrize("engine", ["plain", "snapshot"])
def test_a_method_that_writes_into_the_images_is_refused(engine: EngineName) -> None:
    learner = learner_for(split_scenario(make_store()), Darkens, schedule=Schedule(1))
    learner.evaluator.engine = make_engine(engine, torch.device("cpu"))
    with pytest.raises(RunFailed, match="Darkens writes into the images"):
        run(learner)


def test_future_groups_score_nothing_under_seen() -> None:
    learner = run(learner_for(split_scenario(make_store()), Finetune))
    after_first = learner.matrix[0][1]
    assert after_first[0] > 0
    assert after_first[1:].tolist() == [0, 0]


def test_subset_is_fixed_and_limited() -> None:
    scenario = split_scenario(make_store())
    a, b, other = (draw_subset(scenario.groups, 5, seed, torch.device("cpu")) for seed in (0, 0, 1))
    assert torch.equal(a.rows, b.rows)
    assert not torch.equal(a.rows, other.rows)
    assert a.starts == [0, 5, 10, 15]


class WithNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_features = 16
        self.layer, self.norm, self.fixed = nn.Linear(36, 16), nn.BatchNorm1d(16), nn.BatchNorm1d(16)
        self.fixed.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.fixed(self.norm(self.layer(images.flatten(1))))


def test_batch_norm_is_left_alone() -> None:
    learner = run(learner_for(split_scenario(make_store()), Finetune, backbone=WithNorm, schedule=Schedule(1)))
    network = learner.method.backbone
    before = {key: value.clone() for key, value in network.state_dict().items()}
    learner.evaluator.observe(learner.method, 2, 0, 999, learner.scenario.offsets[-1])
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert network.training
    assert network.norm.training
    assert not network.fixed.training, "a norm that was fixed by hand came back in training mode"


class Cached(Method):
    """Counts forward passes; its backbone moves only when the version says so."""

    def __init__(self, config, backbone, setting) -> None:
        super().__init__(config, backbone, setting)
        self.classifier = nn.Linear(16, setting.num_classes)
        self.version = 0
        self._calls = 0

    def step(self, batch):
        return {}

    def features(self, images, task):
        self._calls += 1
        return self.backbone(images)

    def classify(self, features, allowed, task):
        return self.classifier(features)

    @property
    def features_version(self) -> int:
        return self.version


def test_features_are_kept_while_their_version_holds() -> None:
    scenario = split_scenario(make_store())
    learner = learner_for(scenario, Cached, backbone=Flat)
    method, evaluator, end = learner.method, learner.evaluator, learner.scenario.offsets[-1]
    evaluator.observe(method, 2, 0, 1, end)
    assert method._calls == 3
    with torch.no_grad():
        method.classifier.weight.mul_(-1)
    evaluator.observe(method, 2, 0, 2, end)
    assert method._calls == 3, "only the head moved"
    assert naive_hits(learner, method, (0, 1, 2), end, "seen") == evaluator.drain()["hits"][1].tolist()
    method._calls = 0
    method.version = 1
    evaluator.observe(method, 2, 0, 3, end)
    assert method._calls == 3


@pytest.mark.parametrize("method", [Cached, Finetune])
def test_a_group_without_rows_counts_nothing(method: type[Method]) -> None:
    scenario = split_scenario(make_store())
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = scenario.groups[1]._replace(rows=nothing, targets=nothing)
    some = dataclasses.replace(scenario, groups=(scenario.groups[0], empty, scenario.groups[2]))
    none = dataclasses.replace(scenario, groups=(empty,))
    learner = learner_for(some, method, backbone=Flat)
    end = scenario.offsets[-1]
    learner.evaluator.observe(learner.method, 2, 0, 1, end)
    first, last = naive_hits(learner, learner.method, (0, 2), end, "seen")
    drained = learner.evaluator.drain()
    assert drained["hits"].tolist() == [[first, 0, last]]
    assert drained["valid"].tolist() == [[True, False, True]]
    alone = learner_for(none, method, backbone=Flat)
    alone.evaluator.observe(alone.method, 2, 0, 1, end)
    assert alone.evaluator.drain()["hits"].tolist() == [[0]]
