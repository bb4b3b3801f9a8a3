"""SupSup, SSNeT and ExSSNeT against the vectors of their card and plain references, and the card's invariants."""

import copy
import itertools
import json
import math
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PER_CLASS, Flat, assert_survives_kill, equal, learner_for, make_store, run, split_scenario
from torch import Tensor, nn
from torch.nn import functional as F

import clbench.methods.registry as registry
from clbench.backbones import build
from clbench.data.views import parse_view
from clbench.errors import InputError
from clbench.evaluator import Schedule
from clbench.evaluator.evaluator import watching
from clbench.learner.hostreads import forbid_host_reads
from clbench.learner.learner import Learner
from clbench.learner.run import weights_digest
from clbench.methods._knn_transfer import choose_sources, mean_scores, neighbour_accuracy, num_batches
from clbench.methods._mask_training import WeightConfig
from clbench.methods._supermask import (
    MaskedNetwork,
    exclusive_mask,
    num_kept,
    overlap,
    pack_bits,
    score_gradient,
    select_largest,
    signed_constant,
    top_mask,
    unpack_bits,
)
from clbench.methods._task_inference import entropy, g_objective, infer_tasks, keep_better_half
from clbench.methods.config import make_config
from clbench.methods.exssnet import ExSSNeT, mask_rate
from clbench.methods.ssnet import SSNeT
from clbench.methods.supsup import SupSup
from clbench.scenarios.model import Scenario, StreamDefaults

VECTORS = json.loads((Path(__file__).parent / "fixtures" / "exssnet.json").read_text())["vectors"]
RECIPES = Path(registry.__file__).parent / "recipes"
NO_CURVE = Schedule(0)
METHODS = [SupSup, SSNeT, ExSSNeT]
FAST = StreamDefaults(batch_size=6, epochs=2)


# -- a small world ---------------------------------------------------------------------------------------------------
class Small(nn.Module):
    """Two convolutions with batch norm and bias, mean over the map."""

    def __init__(self, channels: int = 1, width: int = 6) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, stride=2)
        self.bn2 = nn.BatchNorm2d(width)
        self.num_features = width

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        return F.relu(self.bn2(self.conv2(x))).mean((2, 3))


class EndsInReLU(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU())
        self.num_features = 12


def task_scenario(tasks: int = 3, *, val: bool = False, size: int = 6, classes: int = 6, **changes: Any) -> Scenario:
    """Task-incremental unless said otherwise; `val` keeps each fourth training row out for validation."""
    given = {"setting": "task", "defaults": FAST, **changes}
    scenario = split_scenario(make_store(classes, size), tasks, **given)
    if val:
        cut = []
        for task in scenario.tasks:
            held = torch.arange(len(task.rows)) % 4 == 0
            rest = task._replace(rows=task.rows[~held], targets=task.targets[~held])
            cut.append(rest._replace(val=(task.rows[held], task.targets[held])))
        scenario = replace(scenario, tasks=tuple(cut))
    return scenario


def make(
    method: type[Any] = ExSSNeT, scenario: Scenario | None = None, *, size: int = 6,
    backbone: Callable[[], nn.Module] = Small, schedule: Schedule = NO_CURVE, **options: Any,
) -> Learner:  # fmt: skip
    scenario = scenario or task_scenario(size=size)
    config = method.Config(**{"density": 0.3, **options.pop("config", {})})
    store = make_store(len(scenario.classes), size)
    return learner_for(scenario, method, store=store, backbone=backbone, config=config, schedule=schedule, **options)


def answers(learner: Learner, task: int) -> Tensor:
    """Eval logits of a task's test images by that task."""
    method, scenario = learner.method, learner.scenario
    images = learner.stream.read(scenario.groups[task].rows, None, "test")
    with watching(method):
        return method.logits(images, torch.ones(scenario.num_classes, dtype=torch.bool), task)


def enter(learner: Learner, name: str, task: int = 0) -> Any:
    """Begin and open a phase by hand; returns its plan."""
    method, part = learner.method, learner.scenario.tasks[task]
    names = [phase.name for phase in method.phases(part, task)]
    at = learner.at._replace(task=task, phase=names.index(name), iteration=0)
    phase = method.phases(part, task)[at.phase]
    method.begin_phase(part, phase, at)
    method.open_phase(part, phase, at)
    learner.at = at
    return learner.stream.plan(task, phase, at.phase)


def masks_of(method: Any) -> list[Tensor]:
    return [unpack_bits(bits, len(method.weights)) for bits in method.masks[: method.num_finished]]


# -- vectors ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", VECTORS[:3])
def test_vector_supermask(case: dict[str, Any]) -> None:
    scores, density = torch.tensor(case["inputs"]["scores"]), case["inputs"]["k"]
    mask = top_mask(scores, density)
    assert torch.equal(mask.float(), torch.tensor(case["expected"]["mask"]))
    assert int(mask.sum()) == case["expected"]["n_one"] == num_kept(scores.numel(), density)
    assert scores.numel() - int(mask.sum()) == case["expected"]["n_zero"]


def test_vector_straight_through_gradient() -> None:
    inputs, expected = VECTORS[3]["inputs"], VECTORS[3]["expected"]
    weight, x, scores, upstream = (torch.tensor(inputs[key]) for key in ("w", "x", "scores", "upstream"))
    mask = top_mask(scores, inputs["k"])
    effective = (weight * mask).requires_grad_()
    out = x @ effective.T
    torch.testing.assert_close(out, torch.tensor(expected["y"]), atol=1e-6, rtol=1e-6)
    out.backward(upstream)
    grad = effective.grad
    gradient = score_gradient(scores, weight, grad)
    torch.testing.assert_close(gradient, torch.tensor(expected["grad_scores"]), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(grad * mask, torch.tensor(expected["grad_w"]), atol=1e-6, rtol=1e-6)


def test_vector_exclusive_mask() -> None:
    inputs, expected = VECTORS[4]["inputs"], VECTORS[4]["expected"]
    used = torch.zeros_like(torch.tensor(inputs["scores"][0]), dtype=torch.bool)
    for index, scores in enumerate(inputs["scores"]):
        mask = top_mask(torch.tensor(scores), inputs["k"])
        free = exclusive_mask(mask, used)
        assert torch.equal(mask.long(), torch.tensor(expected["masks"][index]))
        assert torch.equal(free.long(), torch.tensor(expected["exclusive"][index]))
        assert int(free.sum()) == expected["counts"][index]
        used |= mask


def test_vector_overlap() -> None:
    inputs, expected = VECTORS[5]["inputs"], VECTORS[5]["expected"]
    used = torch.zeros_like(torch.tensor(inputs["scores"][0]), dtype=torch.bool)
    sparse, total = [], []
    for scores in inputs["scores"]:
        mask = top_mask(torch.tensor(scores), inputs["k"])
        of_mask, of_all = overlap(mask, used)
        sparse.append(of_mask), total.append(of_all)
        used |= mask
    assert sparse == pytest.approx(expected["sparse_overlap"])
    assert total == pytest.approx(expected["total_overlap"])
    assert sum(sparse) / len(sparse) == pytest.approx(expected["avg"])


@pytest.mark.parametrize("rule", ["knn_best", "knn_always", "knn_all"])
def test_vector_sources(rule: str) -> None:
    cases = VECTORS[6]["inputs"]["cases"]
    assert [choose_sources(accuracies, c, rule) for accuracies, c in cases] == VECTORS[6]["expected"][rule]


def test_vector_signed_constant() -> None:
    fan_in, expected = VECTORS[7]["inputs"]["fan_in"], VECTORS[7]["expected"]
    first = nn.Conv2d(3, 8, 3).weight.detach()
    assert first[0].numel() == fan_in
    constant = signed_constant(first)
    torch.testing.assert_close(constant.abs(), torch.full_like(first, expected["abs_value"]))
    assert (len(constant.abs().unique()) == 1) is expected["all_same"]
    assert torch.equal(constant.sign(), first.sign()) is expected["signs_kept"]


# -- the parts -------------------------------------------------------------------------------------------------------
def sorted_mask(scores: Tensor, density: float) -> Tensor:
    """The mask by a full sort, as it is published."""
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[scores.abs().flatten().sort().indices[: int((1 - density) * scores.numel())]] = False
    return mask.view(scores.shape)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.floats(0.01, 1.0), st.integers(0, 10**6), st.booleans())
def test_mask_keeps_the_exact_number_of_the_largest(size: int, density: float, seed: int, ties: bool) -> None:
    scores = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    if ties:
        scores = (scores * 2).round()
    mask = top_mask(scores, density)
    assert int(mask.sum()) == size - int((1 - density) * size)
    kept, dropped = scores.abs()[mask], scores.abs()[~mask]
    assert not len(kept) or not len(dropped) or kept.min() >= dropped.max()
    if not ties:
        assert torch.equal(mask, sorted_mask(scores, density))
        assert torch.equal(mask, top_mask(scores * 3.7, density))  # order alone matters


@settings(max_examples=30, deadline=None)
@given(
    st.integers(20, 3000), st.floats(0.0005, 1.0), st.integers(0, 10**6), st.sampled_from(["plain", "ties", "block"])
)
def test_mask_from_a_sampled_threshold(size: int, density: float, seed: int, kind: str) -> None:
    """Also where the sample misleads: equal values, and large ones that lie together."""
    values = torch.rand(size, generator=torch.Generator().manual_seed(seed))
    if kind == "ties":
        values = (values * 3).round()
    elif kind == "block":
        values[: size // 3] += 1
        values[::7] = -1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clbench.methods._supermask.SAMPLE", 3)
        kept = max(num_kept(size, density), 1)
        mask = torch.full((size,), 7.0)
        select_largest(values, kept, mask)
    assert set(mask.tolist()) <= {0.0, 1.0}
    assert int(mask.sum()) == kept
    on, off = values[mask == 1], values[mask == 0]
    assert not len(off) or on.min() >= off.max()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_keep_a_mask(mask: list[bool]) -> None:
    bits = pack_bits(torch.tensor(mask))
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-len(mask) // 8)
    assert unpack_bits(bits, len(mask)).tolist() == mask


@pytest.mark.parametrize("name", ["reduced-resnet18", "resnet18-cifar", "mlp", "mlp-300-100", "mnistlike", "vgg-small"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_networks_of_ours_can_be_masked(name: str, layout: torch.memory_format) -> None:
    options = {"nf": 4} if "resnet" in name else {"width": 16} if name != "mlp-300-100" else {}
    shape = (1, 32, 32) if name == "mnistlike" else (3, 32, 32)
    network = build(name, in_shape=shape, seed=0, options=options).to(memory_format=layout)
    plain = copy.deepcopy(network)
    head = nn.Linear(network.num_features, 5)
    masked = MaskedNetwork(network, head, 0.1, "supsup")
    layers = [m for m in plain.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert masked.sizes == [*(layer.weight.numel() for layer in layers), head.weight.numel()]
    for layer, piece in zip(layers, masked.layers(masked.weights), strict=False):
        assert torch.equal(piece, signed_constant(layer.weight.detach()))
    scores = masked.draw_scores(torch.Generator().manual_seed(0))
    for piece, score in zip(masked.layers(masked.mask(scores)), masked.layers(scores), strict=True):
        assert int(piece.sum()) == num_kept(piece.numel(), 0.1)
        assert torch.equal(piece != 0, sorted_mask(score, 0.1))
        bound = 1 / math.sqrt(score[0].numel())
        assert score.abs().max() <= bound
        assert score.numel() < 500 or score.abs().max() > 0.95 * bound
    masked.install(masked.weights * masked.mask(scores), masked.statistics.clone())
    masked.train(True)
    gradients = masked.gradients(masked(torch.rand(4, *shape)).square().sum())
    assert [g.shape for g in gradients] == [p.shape for p in [*network.parameters(), *head.parameters()]]
    assert all(g.abs().sum() > 0 for g in gradients)


def test_a_network_without_biases_has_265k_weights() -> None:
    network = build("mlp-300-100", in_shape=(1, 28, 28), seed=0)
    assert len(MaskedNetwork(network, nn.Linear(100, 2), 0.1, "supsup")) == 784 * 300 + 300 * 100 + 100 * 2


# -- one step against autograd ---------------------------------------------------------------------------------------
class Straight(torch.autograd.Function):
    """top-k with the identity as its derivative."""

    @staticmethod
    def forward(ctx: Any, magnitudes: Tensor, density: float) -> Tensor:
        return sorted_mask(magnitudes, density).to(magnitudes.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def reference_loss(network: Small, weights: list[Tensor], images: Tensor, targets: Tensor) -> Tensor:
    def norm(x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)

    x = F.relu(norm(F.conv2d(images, weights[0], padding=1)))
    x = F.relu(norm(F.conv2d(x, weights[1], padding=1, stride=2))).mean((2, 3))
    return F.cross_entropy(F.linear(x, weights[2]), targets)


def test_mask_and_weight_steps_are_those_of_autograd() -> None:
    learner = make(config={"mask_lr": 0.02, "weight_lr": 0.003, "rates": "own"})
    method: Any = learner.method
    plan = enter(learner, "mask")
    scores = [s.detach().clone().requires_grad_() for s in method._network.layers(method.scores)]
    weights = [w.clone() for w in method._network.layers(method.weights)]
    optimizer = torch.optim.Adam(scores, lr=0.02)
    for iteration in range(3):
        batch = learner.stream.batch(plan, learner.at._replace(iteration=iteration))
        loss = method.step(batch)["loss"]
        effective = [w * Straight.apply(s.abs(), 0.3) for w, s in zip(weights, scores, strict=True)]
        expected = reference_loss(method.backbone, effective, batch.images, batch.targets)
        torch.testing.assert_close(loss, expected.detach())
        optimizer.zero_grad()
        expected.backward()
        off = [s.grad[~sorted_mask(s.detach(), 0.3)] for s in scores]
        assert all(grad.abs().sum() > 0 for grad in off)  # dropped weights learn scores as well
        optimizer.step()
        for ours, theirs in zip(method._network.layers(method.scores), scores, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), atol=2e-5, rtol=1e-4)
    part = learner.scenario.tasks[0]
    method.end_phase(part, plan.phase, learner.at)

    masks = [sorted_mask(s.detach(), 0.3) for s in method._network.layers(method.scores)]
    plan = enter(learner, "weight")
    learned = [w.clone().requires_grad_() for w in weights]
    optimizer = torch.optim.Adam(learned, lr=0.003)
    for iteration in range(3):
        batch = learner.stream.batch(plan, learner.at._replace(iteration=iteration))
        loss = method.step(batch)["loss"]
        effective = [w * m for w, m in zip(learned, masks, strict=True)]
        expected = reference_loss(method.backbone, effective, batch.images, batch.targets)
        torch.testing.assert_close(loss, expected.detach())
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    for ours, theirs in zip(method._network.layers(method.live_weights()), learned, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), atol=2e-5, rtol=1e-4)


# -- invariants ------------------------------------------------------------------------------------------------------
def watched(cls: type[Any]) -> tuple[type[Any], list[Any], Callable[[Learner], None]]:
    """A method that keeps, behind each task, its test logits, weights, mask and statistics."""
    kept: list[Any] = []
    box: list[Learner] = []

    class Watched(cls):
        def finish(self, task: int) -> None:
            super().finish(task)
            bits, rows = self.masks.clone(), self.statistics.clone()
            kept.append((answers(box[0], task), self.weights.clone(), bits, rows))

    Watched.__name__ = cls.__name__
    return Watched, kept, box.append


@pytest.mark.parametrize("network", [Small, EndsInReLU])
@pytest.mark.parametrize(("cls", "selection", "transfer"), [
    (SupSup, "task", "none"), (SupSup, "last", "knn_all"), (SSNeT, "last", "none"), (SSNeT, "phase", "knn_all"),
    (ExSSNeT, "task", "none"), (ExSSNeT, "last", "none"), (ExSSNeT, "last", "knn_all"), (ExSSNeT, "phase", "knn_best"),
])  # fmt: skip
def test_nothing_is_forgotten_but_by_ssnet(cls: type[Any], network: Any, selection: str, transfer: str) -> None:
    method_class, kept, tell = watched(cls)
    config = {"selection": selection, "transfer": transfer, "neighbours": 3}
    learner = make(method_class, backbone=network, config={**config, "mask_lr": 0.02})
    tell(learner)
    run(learner)
    method: Any = learner.method
    same = [torch.equal(answers(learner, task), logits) for task, (logits, *_) in enumerate(kept)]
    if cls is SSNeT:
        assert same == [False, False, True]
    else:
        assert same == [True, True, True]
        hits = torch.stack([hits for _, hits in learner.matrix])
        for task in range(3):
            assert (hits[task:, task] == hits[task, task]).all()
    if cls is SupSup:
        assert torch.equal(method.weights, signed_constants(learner))
    for task, (_, _, bits, rows) in enumerate(kept):
        assert torch.equal(method.masks[task], bits[task])
        assert torch.equal(method.statistics[task], rows[task])
    assert len({float(logits.sum()) for logits, *_ in kept}) == 3


def signed_constants(learner: Learner) -> Tensor:
    """The weights that a fresh learner starts from."""
    method: Any = learner.method
    again: Any = make(SupSup, backbone=type(method.backbone)).method
    return again.weights


@pytest.mark.parametrize("cls", [SSNeT, ExSSNeT])
def test_what_the_weight_phase_writes(cls: type[Any]) -> None:
    method_class, kept, tell = watched(cls)
    learner = make(method_class, config={"selection": "last", "weight_lr": 0.02})
    tell(learner)
    start = learner.method.weights.clone()
    run(learner)
    method: Any = learner.method
    masks = masks_of(method)
    used, written = torch.zeros_like(masks[0]), []
    before = start
    for task, (_, weights, *_) in enumerate(kept):
        edit = masks[task] & ~used if cls is ExSSNeT else masks[task]
        changed = weights != before
        assert not (changed & ~edit).any()  # to the bit
        assert changed.sum() > 0.5 * edit.sum()
        written.append(edit)
        assert [int(m.sum()) for m in masks[task].split(method._network.sizes)] == method._network.kept
        assert method.overlaps[task] == pytest.approx(100 * float((masks[task] & used).sum() / masks[task].sum()))
        used |= masks[task]
        before = weights
    assert torch.equal(unpack_bits(method.used, len(used)), used)
    if cls is ExSSNeT:
        assert not (written[0] & written[1]).any()
        assert not (written[2] & (written[0] | written[1])).any()
        assert torch.equal(written[0] | written[1] | written[2], used)


def test_once_all_is_used_a_task_keeps_its_mask_alone() -> None:
    learner = make(config={"density": 1.0, "selection": "last"})
    run(learner)
    method: Any = learner.method
    assert method.overlaps == pytest.approx([0, 100, 100])
    starts = [*learner.task_starts, learner.at.step]
    steps = [b - a for a, b in itertools.pairwise(starts)]
    per_epoch = -(-round(2 * PER_CLASS * 0.9) // 6)
    assert steps == [4 * per_epoch, 3 * per_epoch, 3 * per_epoch]  # two mask epochs, one weight epoch that does nothing


def test_statistics_of_earlier_tasks_survive_probing() -> None:
    seen = []

    class Watched(ExSSNeT):
        def step(self, batch: Any) -> Any:
            before = self.statistics.clone()
            out = super().step(batch)
            if batch.phase.name == "probe":
                seen.append(torch.equal(before, self.statistics))
            return out

    learner = run(make(Watched, config={"transfer": "knn_always"}))
    assert len(seen) > 2
    assert all(seen)
    assert (learner.method.statistics[0] != learner.method.statistics[1]).any()


@pytest.mark.parametrize("network", [Small, EndsInReLU])
def test_kkt_copies_the_scores_of_its_source(network: Any) -> None:
    begun = {}

    class Watched(SupSup):
        def begin_phase(self, task: Any, phase: Any, at: Any) -> None:
            super().begin_phase(task, phase, at)
            if phase.name == "mask":
                begun[at.task] = (self.scores.clone(), self._mask() != 0)

    learner = run(make(Watched, backbone=network, config={"transfer": "knn_always", "selection": "last"}))
    method: Any = learner.method
    assert method.sources[0] == []
    masks = masks_of(method)
    for task in (1, 2):
        (source,) = method.sources[task]
        assert source < task
        assert torch.equal(begun[task][0], method.finished_scores[source])
        assert torch.equal(begun[task][1], masks[source])


def test_features_that_kkt_compares() -> None:
    learner = make(SupSup, backbone=EndsInReLU, config={"transfer": "knn_best", "selection": "last"})
    method: Any = learner.method
    run(learner)
    plan = enter(learner, "probe", 1)
    batch = learner.stream.batch(plan, learner.at)
    method.num_finished = 1
    enter(learner, "probe", 1)
    method.step(batch)
    first, second, _ = method._network.layers(method.effective_of(0))
    expected = F.linear(F.relu(F.linear(batch.images.flatten(1), first)), second)  # ahead of the last ReLU
    torch.testing.assert_close(method.probe_features[0, : len(batch.rows)], expected)
    assert (expected < 0).any()
    assert method.probed == len(batch.rows)
    assert torch.equal(method.probe_targets[: len(batch.rows)], batch.targets - 2)


def test_averaged_scores_leave_the_sources_alone() -> None:
    first, second = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 2.0])
    assert mean_scores([first, second]).tolist() == [2.0, 0.0]
    assert first.tolist() == [1.0, -2.0]
    alone = mean_scores([first])
    assert torch.equal(alone, first)
    assert alone.data_ptr() != first.data_ptr()


def test_neighbours_vote() -> None:
    rng = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (90,), generator=rng)
    features = torch.randn(90, 5, generator=rng) * 0.7 + 2 * torch.eye(3, 5)[targets]
    fit = int(0.66 * 90)
    distances = torch.cdist(features[fit:], features[:fit])
    votes = targets[:fit][distances.sort(dim=1).indices[:, :7]]
    expected = (votes.mode(1).values == targets[fit:]).double().mean()
    assert float(neighbour_accuracy(features, targets, 7, 3)) == pytest.approx(float(expected))
    everyone = targets[:fit].bincount().argmax()
    assert float(neighbour_accuracy(features, targets, 200, 3)) == float((targets[fit:] == everyone).double().mean())
    assert float(neighbour_accuracy(features[:1], targets[:1], 7, 3)) == 0
    assert [num_batches(n) for n in (1, 2, 5, 6, 100)] == [1, 2, 2, 3, 21]


# -- readings of the official code -----------------------------------------------------------------------------------
def test_readings_of_the_rate() -> None:
    assert mask_rate(WeightConfig(), 5) == 0.001
    assert mask_rate(WeightConfig(), 0) == 0.01
    assert mask_rate(WeightConfig(rates="own"), 5) == 0.01
    for cls, rates, expected in ((SupSup, {}, 0.01), (ExSSNeT, {}, 0.001), (ExSSNeT, {"rates": "own"}, 0.01)):
        learner = make(cls, config=rates)
        enter(learner, "mask")
        assert learner.method.optimizer.param_groups[0]["lr"] == expected


@pytest.mark.parametrize(("accuracy", "cuts"), [("rising", [12, 23, 34, 45]), ("falling", [])])
def test_readings_of_the_scheduler(accuracy: str, cuts: list[int]) -> None:
    """Cosine alone, and the official recursion under a plateau rule that takes rising accuracy for no progress."""
    scenario = task_scenario(1, defaults=StreamDefaults(batch_size=12, epochs=50))

    def rates(scheduler: str) -> list[float]:
        learner = make(SupSup, scenario, config={"scheduler": scheduler, "mask_lr": 0.01})
        method: Any = learner.method
        plan = enter(learner, "mask")
        found = []
        method.optimizer.step()  # torch warns of a scheduler ahead of its optimiser
        for epoch in range(50):
            found.append(method.optimizer.param_groups[0]["lr"])
            hits = epoch + 1 if accuracy == "rising" else 50 - epoch
            method._validate = lambda task, index, hits=hits: (hits, 100)
            method.end_epoch(scenario.tasks[0], plan.phase, learner.at)
        return found

    cosine = [0.01 * (1 + math.cos(math.pi * epoch / 50)) / 2 for epoch in range(50)]
    assert rates("cosine") == pytest.approx(cosine)
    factor, expected = 1.0, []
    for epoch in range(50):
        factor *= 0.1 if epoch in cuts else 1.0
        expected.append(factor * cosine[epoch])
    assert rates("official") == pytest.approx(expected)


@pytest.mark.parametrize(("selection", "chosen"), [("task", [1, 7]), ("phase", [2, 7]), ("last", [3, 7])])
def test_which_epoch_of_a_task_is_kept(selection: str, chosen: list[int]) -> None:
    """Two mask epochs and two weight epochs for each of two tasks."""
    scenario = task_scenario(2, val=True, defaults=StreamDefaults(batch_size=6, epochs=2))
    hits = iter([3, 5, 5, 4, 1, 2, 3, 3 if selection == "phase" else 4])
    states, rest = [], []

    class Watched(ExSSNeT):
        def _validate(self, task: Any, index: int) -> tuple[int, int]:
            states.append((self.live_weights().clone(), self.scores.clone(), self.statistics[index].clone()))
            return next(hits), 18

        def finish(self, task: int) -> None:
            super().finish(task)
            rest.append(self.weights.clone())

    learner = make(Watched, scenario, config={"weight_lr": 0.02, "selection": selection})
    method: Any = learner.method
    start = method.weights.clone()
    run(learner)
    for task, epoch in enumerate(chosen):
        weights, scores, statistics = states[epoch]
        assert torch.equal(rest[task], weights)
        assert torch.equal(method.statistics[task], statistics)
        assert torch.equal(masks_of(method)[task], method._mask(scores) != 0)
    assert torch.equal(rest[0], start) is (selection == "task")  # its best epoch was of the mask phase


def test_rows_kept_out_of_training() -> None:
    plain, with_val = task_scenario(), task_scenario(val=True)
    n = 2 * PER_CLASS
    for scenario, config, rows in (
        (plain, {}, n - round(0.1 * n)),
        (plain, {"val_share": 0.25}, n - 6),
        (plain, {"selection": "last", "scheduler": "cosine"}, n),
        (plain, {"selection": "last"}, n - round(0.1 * n)),  # the official scheduler is fed an accuracy
        (with_val, {}, n - 6),
    ):
        plans = make(ExSSNeT, scenario, config=config).plans()
        assert {len(plan.rows) for plan in plans[0]} == {rows}
        assert [plan.phase.name for plan in plans[0]] == ["mask", "weight"]
    method: Any = make(ExSSNeT, plain).method
    enter(make(ExSSNeT, plain), "mask")
    hits, num = method._validate(plain.tasks[0], 0)
    assert (0 <= hits <= num, num) == (True, round(0.1 * n))


def test_phases() -> None:
    def names(cls: type[Any], **config: Any) -> list[list[tuple[str, int]]]:
        plans = make(cls, config=config).plans()
        return [[(plan.phase.name, plan.iterations // plan.per_epoch) for plan in task] for task in plans]

    assert names(SupSup) == [[("mask", 2)]] * 3
    assert names(ExSSNeT, weight_epochs=3) == [[("mask", 2), ("weight", 3)]] * 3
    assert names(ExSSNeT, weight_epochs=0) == [[("mask", 2)]] * 3
    probed = names(SSNeT, transfer="knn_best")
    assert probed[0] == [("mask", 2), ("weight", 2)]
    assert [name for name, _ in probed[1]] == ["probe", "mask", "weight"]


# -- answers ---------------------------------------------------------------------------------------------------------
def test_tasks_with_fewer_classes_and_mixed_order() -> None:
    scenario = task_scenario(3)
    mixed = [torch.tensor([4, 1, 0]), torch.tensor([5]), torch.tensor([3, 2])]
    store = make_store(6)
    tasks, groups = [], []
    for index, classes in enumerate(mixed):
        rows = torch.cat([task.rows[torch.isin(task.targets, classes)] for task in scenario.tasks])
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(index))]
        asked = torch.cat([g.rows[torch.isin(g.targets, classes)] for g in scenario.groups])
        tasks.append(scenario.tasks[index]._replace(rows=rows, targets=store.labels[rows], classes=classes))
        groups.append(scenario.groups[index]._replace(rows=asked, targets=store.labels[asked], classes=classes))
    scenario = replace(scenario, tasks=tuple(tasks), groups=tuple(groups), defaults=StreamDefaults(6, epochs=25))
    learner = run(make(ExSSNeT, scenario, config={"rates": "own", "density": 0.5}))
    method: Any = learner.method
    assert method.classifier.weight.shape == (3, 6)
    for index, classes in enumerate(mixed):
        others = torch.ones(6, dtype=torch.bool)
        others[classes] = False
        logits = answers(learner, index)
        assert logits[:, others].max() < logits[:, classes].min()
        assert torch.isfinite(logits).all()
    hits = learner.matrix[-1][1]
    assert hits[1] == 6
    assert hits.sum() > 0.75 * 36  # chance: 6 + 6 + 6 of 36


@pytest.mark.parametrize("cls", METHODS)
def test_answers_of_other_tasks_leave_training_as_it_is(cls: type[Any]) -> None:
    """Also a task that has not begun, and with the memory for kept weights used up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clbench.methods._mask_training.CACHE_BYTES", 1)
        on, off = make(cls, schedule=Schedule(1)), make(cls, schedule=NO_CURVE)
        run(on), run(off)
    assert weights_digest(on.method) == weights_digest(off.method)
    learner = make(cls)
    enter(learner, "mask")
    pointer = learner.method.backbone.conv1.weight.data_ptr()
    for task in range(3):
        assert torch.isfinite(answers(learner, task)).all()
    assert learner.method.backbone.conv1.weight.data_ptr() == pointer == learner.method.effective.data_ptr()


def test_ssnet_answers_earlier_tasks_with_weights_as_they_are() -> None:
    seen = []

    class Watched(SSNeT):
        def step(self, batch: Any) -> Any:
            out = super().step(batch)
            if batch.at.task == 1 and batch.phase.name == "weight":
                seen.append(answers(learner, 0))
            return out

    learner = make(Watched, task_scenario(2), config={"weight_lr": 0.05, "selection": "last"})
    run(learner)
    assert not torch.equal(seen[0], seen[-1])
    assert torch.equal(seen[-1], answers(learner, 0))


# -- task inference --------------------------------------------------------------------------------------------------
def inference_parts(seed: int = 0, tasks: int = 5) -> tuple[MaskedNetwork, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    network = MaskedNetwork(Small(), nn.Linear(6, 4), 0.3, "supsup")
    network.train(False)
    rng = torch.Generator().manual_seed(seed)
    weights = torch.stack([network.weights * network.mask(network.draw_scores(rng)) for _ in range(tasks)])
    statistics = network.statistics + 0.1 * torch.randn((tasks, len(network.statistics)), generator=rng)
    return network, weights, statistics, torch.randn((3, 2, 1, 6, 6), generator=rng)


def reference_gradient(
    network: MaskedNetwork, weights: Tensor, statistics: Tensor, block: Tensor, objective: Any, kept: list[int]
) -> Tensor:
    """d objective / d a_i of one block at equal a, by differences in double precision of a plain network."""
    pieces = [piece.double() for piece in network.layers(weights[0])]
    shapes = [piece.shape for piece in pieces]
    split = [[p.double() for p in network.layers(w)] for w in weights]
    stats = statistics[kept].double().mean(0).split([6, 6, 6, 6])

    def value(a: Tensor) -> Tensor:
        w = [sum(a[i] * split[i][layer] for i in range(len(a))) for layer in range(len(shapes))]
        x = F.relu(F.batch_norm(F.conv2d(block.double(), w[0], padding=1), stats[0], stats[1]))
        x = F.relu(F.batch_norm(F.conv2d(x, w[1], padding=1, stride=2), stats[2], stats[3])).mean((2, 3))
        return objective(F.linear(x, w[2])).mean()

    a = torch.zeros(len(weights), dtype=torch.float64)
    a[kept] = 1 / len(kept)
    return torch.autograd.functional.jacobian(value, a)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("objective", [entropy, lambda logits: g_objective(logits, 2)])
def test_inferred_tasks_are_those_of_a_plain_reference(objective: Any, binary: bool) -> None:
    answers = set()
    for seed in range(4):
        network, weights, statistics, images = inference_parts(seed)
        found = infer_tasks(network, weights, statistics, images, objective, binary=binary)
        for block, task in zip(images, found.tolist(), strict=True):
            kept = list(range(len(weights)))
            while binary and len(kept) > 1:
                gradient = reference_gradient(network, weights, statistics, block, objective, kept)
                kept = sorted(sorted(kept, key=gradient.tolist().__getitem__)[: -(-len(kept) // 2)])
            if not binary:
                kept = [int(reference_gradient(network, weights, statistics, block, objective, kept).argmin())]
            assert task == kept[0]
        answers |= set(found.tolist())
    assert len(answers) > 1


def test_objectives() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5, -1.0]], requires_grad=True)
    p = logits.detach().softmax(1)
    assert float(entropy(logits.detach())) == pytest.approx(float(-(p * p.log()).sum()))
    value = g_objective(logits, 2)
    assert float(value.detach()) == pytest.approx(float(logits.detach().logsumexp(1)))
    value.backward()
    torch.testing.assert_close(logits.grad, torch.cat([torch.zeros(1, 2), p[:, 2:]], 1))
    keep = keep_better_half(torch.tensor([[3.0, 1.0, 2.0, 0.0, 5.0]]), torch.tensor([[1, 1, 1, 0, 1]]).bool(), 4)
    assert keep.tolist() == [[False, True, True, False, False]]


@pytest.mark.parametrize("config", [
    {}, {"inference": "binary", "vote": 4}, {"objective": "g", "superfluous": 6, "rule": "threshold", "vote": 36},
])  # fmt: skip
def test_task_inference_in_a_run(config: dict[str, Any]) -> None:
    scenario = task_scenario(3, setting="class", defaults=StreamDefaults(batch_size=6, epochs=12))
    learner = make(SupSup, scenario, backbone=EndsInReLU, config={**config, "mask_lr": 0.03})
    learner.guard = forbid_host_reads
    learner.schedule = Schedule(5)
    run(learner)
    method: Any = learner.method
    images = torch.cat([learner.stream.read(group.rows, None, "test") for group in scenario.groups])
    allowed = torch.ones(6, dtype=torch.bool)
    with watching(method):
        logits = method.logits(images, allowed, None)
        by_task = torch.stack([method.logits(images, allowed, task) for task in range(3)])
        assert method.logits(images[:0], allowed, None).shape == (0, 6)
    assert logits.shape == (36, 6)
    task = (logits.view(36, 3, 2) > -1e4).any(2).long().argmax(1)  # the one whose classes are answered
    torch.testing.assert_close(logits, by_task[task, torch.arange(36)], atol=1e-4, rtol=1e-4)
    vote = config.get("vote", 1)
    assert all(len(block.unique()) == 1 for block in task.split(vote))


def test_threshold_masks() -> None:
    learner = make(SupSup, config={"rule": "threshold", "selection": "last"})
    method: Any = learner.method
    plan = enter(learner, "mask")
    before = method.scores.clone()
    assert torch.equal(method.effective, method.weights * (before >= 0))
    method.optimizer = torch.optim.SGD([method.scores], lr=1.0)
    batch = learner.stream.batch(plan, learner.at)
    effective = [layer.clone().requires_grad_() for layer in method._network.layers(method.effective)]
    reference_loss(method.backbone, effective, batch.images, batch.targets).backward()
    method.step(batch)
    moved = method.weights * method._network.flatten([layer.grad for layer in effective])  # no sign of s
    torch.testing.assert_close(before - method.scores, moved)
    method.end_phase(learner.scenario.tasks[0], plan.phase, learner.at)
    assert torch.equal(masks_of(method)[0], method.scores >= 0)


# -- kill and resume -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("cls", "config"), [
    (SupSup, {"transfer": "knn_best", "neighbours": 3}), (SSNeT, {}),
    (ExSSNeT, {"transfer": "knn_all", "density": 0.6}), (ExSSNeT, {"scheduler": "cosine", "selection": "last"}),
])  # fmt: skip
def test_survives_kill(cls: type[Any], config: dict[str, Any]) -> None:
    scenario = task_scenario(defaults=StreamDefaults(batch_size=8, epochs=2))

    def one(**options: Any) -> Learner:
        return make(cls, scenario, config=config, schedule=Schedule(2), **options)

    whole = assert_survives_kill(one, at_most=10)
    again = run(one())
    assert weights_digest(whole.method) == weights_digest(again.method)


def test_survives_kill_where_tasks_are_inferred() -> None:
    scenario = task_scenario(setting="class", defaults=StreamDefaults(batch_size=8, epochs=2))
    assert_survives_kill(lambda **o: make(SupSup, scenario, backbone=EndsInReLU, schedule=Schedule(2), **o), at_most=5)


def test_a_run_resumed_behind_its_last_step_answers_the_same() -> None:
    saved: list[dict[str, Any]] = []
    whole = run(make(save=lambda state: saved.append(copy.deepcopy(state))))
    resumed = make()
    resumed.load_state_dict(saved[-1])
    run(resumed)
    assert weights_digest(resumed.method) == weights_digest(whole.method)
    assert "backbone" not in saved[-1]["method"]
    assert all(equal(answers(resumed, task), answers(whole, task)) for task in range(3))


@pytest.mark.parametrize("cls", METHODS)
def test_no_host_reads(cls: type[Any]) -> None:
    learner = make(cls, config={"transfer": "knn_best"}, schedule=Schedule(1))
    learner.guard = forbid_host_reads
    run(learner)
    assert learner.at.task == 3


# -- memory, bad input, recipes --------------------------------------------------------------------------------------
@pytest.mark.parametrize("cls", METHODS)
@pytest.mark.parametrize("transfer", ["none", "knn_best"])
def test_memory_per_task(cls: type[Any], transfer: str) -> None:
    learner = run(make(cls, config={"transfer": transfer}))
    size = 9 * 6 + 9 * 36 + 2 * 6
    for done, memory in enumerate(learner.memory, 1):
        expected = {
            "masks": done * -(-size // 8),
            "batch_norm_statistics": done * 2 * 12 * 4,
            "scores": done * 4 * size if transfer != "none" else 0,
        }
        if cls is ExSSNeT:
            expected["used_weights"] = -(-size // 8)
        assert memory == expected
    assert set(make(cls).method.memory_bytes().values()) == {0}


def positions() -> nn.Module:
    return build("vit-tiny-32", in_shape=(1, 8, 8), seed=0, options={"depth": 1, "width": 12})


def cumulative() -> nn.Module:
    network = Small()
    network.bn2.momentum = None
    return network


class Pixels(nn.Flatten):
    num_features = 36


class Pretrained(Flat):
    pretrained_on = ("imagenet",)


@pytest.mark.parametrize(("backbone", "size", "words"), [
    (Pixels, 6, "backbone Pixels has none: choose --backbone reduced-resnet18"),
    (positions, 8, "backbone vit-tiny-32 also learns"),
    (cumulative, 6, "no momentum"),
    (Pretrained, 6, "pretrained weights of backbone Pretrained would be lost"),
])  # fmt: skip
@pytest.mark.parametrize("cls", METHODS)
def test_networks_that_cannot_be_masked_are_refused(
    cls: type[Any], backbone: Callable[[], nn.Module], size: int, words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        make(cls, backbone=backbone, size=size)
    assert str(caught.value).startswith(f"{cls.__name__.lower()} ")


def test_values_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(InputError, match=r"density=0.0 leaves no weight of conv1 on"):
        make(SupSup, config={"density": 0.0})
    for cls in (SSNeT, ExSSNeT):
        with pytest.raises(InputError, match="must not decay weights"):
            make(cls, config={"weight_decay": 1e-4})
    assert make(SupSup, config={"weight_decay": 1e-4}).method is not None
    with pytest.raises(InputError, match="superfluous=0 gives none"):
        make(SupSup, config={"objective": "g"})
    with pytest.raises(InputError, match="keeps none: raise val_share"):
        make(config={"val_share": 0.0}).plans()
    with pytest.raises(InputError, match="keeps none: raise val_share"):
        make(config={"val_share": 0.0, "selection": "last"}).plans()
    with pytest.raises(InputError, match="without the task of an image"):
        make().method.features(torch.zeros(1, 1, 6, 6), None)


def test_scenarios_that_cannot_be_used_are_refused() -> None:
    scenario = task_scenario()
    shared = [task._replace(classes=torch.arange(2)) for task in scenario.tasks]
    with pytest.raises(InputError, match="a class of an earlier task"):
        make(scenario=replace(scenario, tasks=tuple(shared)))
    with pytest.raises(InputError, match="is online"):
        make(scenario=replace(scenario, online=True))
    wrong = scenario.tasks[0]._replace(targets=scenario.tasks[0].targets + 2)
    with pytest.raises(InputError, match="rows of other tasks' classes"):
        make(scenario=replace(scenario, tasks=(wrong, *scenario.tasks[1:]))).plans()
    ordered = scenario.tasks[0]
    ordered = ordered._replace(rows=ordered.rows.sort().values, targets=ordered.targets.sort().values)
    sorted_rows = replace(scenario, tasks=(ordered, *scenario.tasks[1:]))
    with pytest.raises(InputError, match=r"last 14 rows .* class 'class 1' is then only in one of the two parts"):
        make(scenario=sorted_rows, config={"val_share": 0.6}).plans()
    assert make(scenario=sorted_rows, config={"val_share": 0.4}).plans()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clbench.methods._mask_training.SURELY_ALL", 5)
        with pytest.raises(InputError, match="class 'class 0' is then only in one"):
            make(scenario=sorted_rows, config={"val_share": 0.42}).plans()
    single = replace(scenario, defaults=StreamDefaults(batch_size=1, epochs=1))
    with pytest.raises(InputError, match="need two images"):
        make(scenario=single).plans()
    assert make(scenario=single, backbone=EndsInReLU).plans()


def test_a_last_batch_of_one_image_is_left_out_of_batch_norms() -> None:
    rows = 2 * PER_CLASS - round(0.2 * PER_CLASS)
    scenario = task_scenario(defaults=StreamDefaults(batch_size=rows - 1, epochs=1))
    assert make(scenario=scenario).plans()[0][0].per_epoch == 1
    assert make(scenario=scenario, backbone=EndsInReLU).plans()[0][0].per_epoch == 2


@pytest.mark.parametrize("cls", METHODS)
def test_recipes_resolve(cls: type[Any]) -> None:
    recipes = tomllib.loads((RECIPES / f"{cls.__name__.lower()}.toml").read_text())["recipe"]
    assert {recipe["scenario"] for recipe in recipes} == {"split-mnist*", "split-cifar100*"}
    for recipe in recipes:
        config, _ = make_config(cls.Config, {"recipe": recipe["set"]}, cls.__name__)
        assert config.density == 0.1
        shape = (3, 32, 32) if "cifar" in recipe["scenario"] else (1, 28, 28)
        for key in ("train_view", "test_view"):
            assert parse_view(recipe["run"][key]).output_shape(shape) == shape
        assert build(recipe["backbone"], in_shape=shape, seed=0).num_features in (100, 160)


def test_masks_of_the_stored_size() -> None:
    """Bits, not bytes: the reduced ResNet-18 of the card, 1.090 M weights, takes 137 kB per task."""
    network = build("reduced-resnet18", in_shape=(3, 32, 32), seed=0)
    masked = MaskedNetwork(network, nn.Linear(160, 20, bias=False), 0.1, "supsup")
    assert len(pack_bits(torch.zeros(len(masked), dtype=torch.bool))) == pytest.approx(137e3, rel=0.01)
