"""SLCA against vectors of the official code, against a plain reference of the whole algorithm, and its invariants.

The class is driven by a small loop that does what the learner does, on random vectors in place of images.
"""

import copy
import io
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import clbench.methods.slca as slca_module
from clbench.data.classes import ClassTable
from clbench.data.views import parse_view
from clbench.errors import InputError, RunFailed
from clbench.learner.hostreads import forbid_host_reads
from clbench.methods.base import Setting
from clbench.methods.config import make_config
from clbench.methods.slca import (
    METHOD,
    SLCA,
    SLCAConfig,
    alignment_loss,
    class_statistics,
    cosine_rate,
    covariance_factor,
    mean_norm,
    mean_shrink,
    sample_features,
    slow_learner_loss,
    step_rate,
)
from clbench.rng import generator
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Cursor, Phase

HERE = Path(__file__).parent
VECTORS = json.loads((HERE / "fixtures" / "slca.json").read_text())
RECIPES = Path(slca_module.__file__).parent / "recipes"
CPU = torch.device("cpu")


# -- a small world ---------------------------------------------------------------------------------------------------
class Backbone(nn.Module):
    """A linear map and a batch norm: what is learned, and what only eval mode keeps still."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.num_features = width
        rng = torch.Generator().manual_seed(5)
        self.linear = nn.Linear(inputs, width)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(width, inputs, generator=rng))
            self.linear.bias.zero_()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.norm(self.linear(images))
        return out


class Identity(nn.Identity):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width


@dataclass
class World:
    """Tasks over random vectors: the classes of each task, and how many rows each class has."""

    images: Tensor
    tasks: list[Task]
    num_classes: int
    epochs: int = 2
    batch_size: int = 6
    online: bool = False

    @property
    def setting(self) -> Setting:
        table = ClassTable(
            tuple(f"c{i}" for i in range(self.num_classes)),
            torch.zeros(self.num_classes).long(),
            torch.full((self.num_classes,), -1),
        )
        return Setting(
            classes=table, classes_per_task=tuple(len(t.classes) for t in self.tasks),
            task_classes=tuple(t.classes for t in self.tasks), image_shape=tuple(self.images.shape[1:]),
            image_bytes=1, device=CPU, scenario_id="test@1", setting="class", online=self.online, epochs=self.epochs,
            batch_size=self.batch_size, updates_per_batch=1, prompts={}, read=lambda *a, **k: torch.zeros(0),
            rng=partial(generator, 7, device=CPU),
        )  # fmt: skip


def make_world(
    classes: Sequence[Sequence[int]] = ((0, 1), (2, 3, 4), (5,)),
    rows_per_class: int | Sequence[int] = 9,
    *,
    inputs: int = 5,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> World:
    arrival = [c for task in classes for c in task]
    counts = [rows_per_class] * len(arrival) if isinstance(rows_per_class, int) else list(rows_per_class)
    rng = torch.Generator().manual_seed(seed)
    images, tasks, start = [], [], 0
    for task in classes:
        targets = torch.cat([torch.full((counts[arrival.index(c)],), c) for c in task])
        centres = 2 * torch.randn(len(arrival), inputs, generator=rng, dtype=torch.float64)
        position = torch.tensor([arrival.index(int(c)) for c in targets])
        noise = torch.randn(len(targets), inputs, generator=rng, dtype=torch.float64)
        order = torch.randperm(len(targets), generator=rng)
        images.append((centres[position] + noise)[order])
        tasks.append(Task(torch.arange(start, start + len(targets)), targets[order], torch.tensor(list(task))))
        start += len(targets)
    return World(torch.cat(images).to(dtype), tasks, max(arrival) + 1, **options)


def make_method(world: World, **config: Any) -> SLCA:
    values = {"ca_samples": 6, "ca_epochs": 2, "milestone": 1, "lr": 0.1, "backbone_scale": 0.1, "batch_norm": "train"}
    values |= config
    inputs = world.images.shape[1]
    backbone: nn.Module = Identity(inputs) if values["backbone_scale"] == 0 else Backbone(inputs, 4)
    method = SLCA(SLCAConfig(**values), backbone.to(world.images.dtype), world.setting)
    if world.images.dtype == torch.float64:
        to_double(method)
    return method


def to_double(method: SLCA) -> None:
    method.classifier.double()
    method.recall_weight, method.recall_bias = method.recall_weight.double(), method.recall_bias.double()


def iterations(world: World, phase: Phase, task: Task) -> tuple[int, int]:
    """Batches per epoch (0 if the method draws its own), and of the whole phase."""
    if phase.source == "none":
        assert phase.iterations is not None
        return 0, phase.iterations
    per_epoch = -(-len(task.rows) // (phase.batch_size or world.batch_size))
    return per_epoch, per_epoch * (world.epochs if phase.epochs is None else phase.epochs)


def batch_of(world: World, task: Task, phase: Phase, at: Cursor, per_epoch: int) -> Batch:
    seen = torch.ones(world.num_classes, dtype=torch.bool)
    if phase.source == "none":
        none = task.rows[:0]
        return Batch(torch.empty(0), none, none, None, seen, at, phase, 0)
    epoch, inside = divmod(at.iteration, per_epoch)
    size = phase.batch_size or world.batch_size
    order = torch.arange(len(task.rows))
    if phase.order == "shuffled":
        order = torch.randperm(len(task.rows), generator=generator(0, "shuffle", at.task, at.phase, epoch))
    chosen = order[inside * size : (inside + 1) * size]
    rows = task.rows[chosen]
    return Batch(world.images[rows], task.targets[chosen], rows, None, seen, at, phase, epoch)


def drive(
    method: SLCA, world: World, resume: dict[str, Any] | None = None, autocast: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Run everything, yielding a checkpoint after every step (`inside` a phase) and after every task. `resume`: a
    checkpoint to go on from. autocast: phases whose steps are run in bf16 where a method lets them."""
    at, inside, state = Cursor(0, 0, 0, 0, 0), False, None
    if resume is not None:
        at, inside, state = resume["at"], resume["inside"], resume["method"]
        if not inside:
            method.load_state_dict(state)
            state = None
    while at.task < len(world.tasks):
        task = world.tasks[at.task]
        phases = method.phases(task, at.task)
        if at.phase == len(phases):
            at = Cursor(at.task + 1, 0, 0, 0, at.step)
            yield {"at": at, "inside": False, "losses": {}, "phase": "-"}
            continue
        phase = phases[at.phase]
        per_epoch, total = iterations(world, phase, task)
        if not inside:
            method.begin_phase(task, phase, at)
            inside = True
        method.open_phase(task, phase, at)
        if state is not None:
            method.load_state_dict(state)
            state = None
        while at.iteration < total:
            bf16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=phase.name in autocast)
            with forbid_host_reads(), bf16:
                losses = method.step(batch_of(world, task, phase, at, per_epoch))
            at = at._replace(iteration=at.iteration + 1, step=at.step + 1)
            yield {"at": at, "inside": True, "losses": losses, "phase": phase.name}
        method.end_phase(task, phase, at)
        inside = False
        at = at._replace(phase=at.phase + 1, iteration=0)


def finish(method: SLCA, world: World, **options: Any) -> SLCA:
    for _ in drive(method, world, **options):
        pass
    return method


def saved(method: SLCA) -> dict[str, Any]:
    """A state as it comes back from disk."""
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, through all containers."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def answers(method: SLCA, images: Tensor) -> Tensor:
    method.backbone.eval()
    with torch.no_grad():
        return method.logits(images, torch.ones(method.setting.num_classes, dtype=torch.bool), None)


# -- vectors of the official code ------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", VECTORS["loss"], ids=["two-tasks", "one-task"])
def test_official_alignment_loss_and_gradient(case: dict[str, Any]) -> None:
    logits = torch.tensor(case["logits"], dtype=torch.float64, requires_grad=True)
    norms = mean_norm(logits, case["task_sizes"])
    loss = alignment_loss(logits, torch.tensor(case["targets"]), case["task_sizes"], case["tau"])
    loss.backward()
    close = partial(torch.testing.assert_close, atol=1e-9, rtol=0, check_dtype=False)
    close(norms, torch.tensor(case["norms"], dtype=torch.float64))
    close(loss, torch.tensor(case["loss"], dtype=torch.float64))
    close(logits.grad, torch.tensor(case["grad_logits"], dtype=torch.float64))
    assert logits.grad is not None
    assert float((logits.grad * logits.detach()).sum(1).abs().max()) < 1e-6  # a detached norm fails this


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", VECTORS["alignment"], ids=["normalised", "plain"])
def test_official_alignment_run(case: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    sizes, size = case["task_sizes"], case["n_per_class"]
    tensor = partial(torch.tensor, dtype=dtype)
    z, order = tensor(case["z"]), torch.tensor(case["perm"])

    class Given(SLCA):
        def _noise(self, task: int, epoch: int) -> tuple[list[Tensor], Tensor]:
            return list(z[epoch].split(sizes)), order[epoch]

    ids = torch.arange(sum(sizes)).split(sizes)
    world = make_world([c.tolist() for c in ids], inputs=case["D"], dtype=dtype)
    config = SLCAConfig(
        ca_epochs=case["epochs"], ca_samples=size, ca_lr=case["lr"], momentum=case["momentum"],
        weight_decay=case["weight_decay"], temperature=case["tau"] or 0.0, backbone_scale=0.0,
    )  # fmt: skip
    method = Given(config, Identity(case["D"]), world.setting)
    method.classifier.to(dtype)
    method.classifier.weight.copy_(torch.cat([tensor(weight) for weight, _ in case["heads_before"]]))
    method.classifier.bias.copy_(torch.cat([tensor(bias) for _, bias in case["heads_before"]]))
    method.means[:] = torch.tensor(case["class_means"], dtype=torch.float64)
    factors = torch.linalg.cholesky(torch.tensor(case["class_covs"], dtype=torch.float64)).mT.to(dtype)
    method.factors = list(factors.split(sizes))

    task_index = case["cur_task"]
    task = world.tasks[task_index]
    phase = method.phases(task, task_index)[-1]
    assert (phase.name, phase.source) == ("align", "none")
    at = Cursor(task_index, 2, 0, 0, 0)
    method.begin_phase(task, phase, at)
    method.open_phase(task, phase, at)
    losses = []
    for iteration in range(phase.iterations or 0):
        losses.append(float(method.step(batch_of(world, task, phase, at._replace(iteration=iteration), 0))["loss"]))
    method.end_phase(task, phase, at)

    assert losses == pytest.approx(case["batch_losses"], abs=tolerance)
    weights = torch.cat([tensor(weight) for weight, _ in case["heads_after"]])
    biases = torch.cat([tensor(bias) for _, bias in case["heads_after"]])
    torch.testing.assert_close(method.classifier.weight.detach(), weights, atol=tolerance, rtol=0)
    torch.testing.assert_close(method.classifier.bias.detach(), biases, atol=tolerance, rtol=0)
    rates = [cosine_rate(case["lr"], epoch, case["epochs"]) for epoch in range(case["epochs"])]
    assert rates == pytest.approx(case["lr_per_epoch"], abs=1e-12)


def test_official_stage_1_loss_and_gradient() -> None:
    """The vector is SLCA++'s a CE + b RCE; RCE = -ln(1e-4) (1 - exp(-CE)) row by row, so both rest on our CE."""
    case = VECTORS["stage1"]
    logits = torch.tensor(case["logits"], dtype=torch.float64, requires_grad=True)
    targets = torch.tensor(case["targets"])
    rows = torch.stack([slow_learner_loss(logits[i : i + 1], targets[i : i + 1], case["known"]) for i in range(4)])
    ce = slow_learner_loss(logits, targets, case["known"])
    rce = (-np.log(1e-4) * (1 - torch.exp(-rows))).mean()
    loss = case["sce_a"] * ce + case["sce_b"] * rce
    loss.backward()
    for value, key in ((ce, "ce"), (rce, "rce"), (loss, "loss")):
        assert float(value.detach()) == pytest.approx(case[key], abs=1e-9)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor(case["grad_logits"], dtype=torch.float64), atol=1e-9, rtol=0)
    assert (logits.grad[:, : case["known"]] == 0).all()


def test_official_class_statistics() -> None:
    case = VECTORS["statistics"]
    mean, covariance = class_statistics(torch.tensor(case["features"], dtype=torch.float64), 1e-4)
    torch.testing.assert_close(mean, torch.tensor(case["mean"], dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(covariance, torch.tensor(case["cov"], dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("row", VECTORS["shrink"], ids=["even", "uneven"])
def test_official_mean_shrink(row: dict[str, Any]) -> None:
    sizes, task = row["task_sizes"], row["cur_task"]
    world = make_world([c.tolist() for c in torch.arange(sum(sizes)).split(sizes)], rows_per_class=1)
    for official, key in ((True, "official_scale"), (False, "clean_scale")):
        scale = make_method(world, official_task_index=official)._mean_scale(task)
        assert scale.tolist() == pytest.approx(row[key], abs=1e-12)
    assert make_method(world, shrink_means=False)._mean_scale(task).tolist() == [1.0] * sum(sizes)
    clean = make_method(world)._mean_scale(task)
    assert (clean[-sizes[-1] :] == 1).all()  # the newest task is not shrunk


# -- the whole algorithm against a plain reference -------------------------------------------------------------------
def reference_slca(world: World, config: SLCAConfig, backbone: nn.Module) -> list[Tensor]:
    """The card's pseudocode, one module per head and one Gaussian per class, with the draws that the class makes.

    Returns (n, C) logits of all images after each task, computed with the aligned heads.
    """
    heads: list[nn.Linear] = []
    sizes: list[int] = []
    stats: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    slow = config.backbone_scale > 0
    out = []
    for index, task in enumerate(world.tasks):
        ids = task.classes.tolist()
        known, sizes = sum(sizes), [*sizes, len(ids)]
        head = nn.Linear(backbone.num_features, len(ids)).double()
        nn.init.trunc_normal_(head.weight, std=0.02, generator=world.setting.rng("slca-head", index))
        nn.init.zeros_(head.bias)
        for old in heads:
            old.requires_grad_(False)
        heads.append(head)
        groups: list[dict[str, Any]] = [{"params": head.parameters(), "lr": config.lr}]
        if slow:
            groups.append({"params": backbone.parameters(), "lr": config.lr * config.backbone_scale})
        optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [config.milestone], config.gamma)
        phase = Phase("train")
        per_epoch, total = iterations(world, phase, task)
        backbone.train(slow)
        for iteration in range(total):
            batch = batch_of(world, task, phase, Cursor(index, 0, iteration, 0, 0), per_epoch)
            inputs = backbone(batch.images)
            logits = torch.cat([head(inputs) for head in heads], dim=1)
            columns = torch.tensor([known + ids.index(int(c)) for c in batch.targets])
            optimizer.zero_grad()
            F.cross_entropy(logits[:, known:], columns - known).backward()
            optimizer.step()
            if (iteration + 1) % per_epoch == 0:
                scheduler.step()
        backup = copy.deepcopy(heads)
        backbone.eval()
        with torch.no_grad():
            features = backbone(world.images[task.rows]).numpy()
        for c in ids:
            x = features[(task.targets == c).numpy()]
            cov = np.cov(x, rowvar=False) if len(x) > 1 else np.zeros((x.shape[1],) * 2)
            stats.append((x.mean(0), cov + config.ridge * np.eye(x.shape[1])))
        if index > 0:
            for head in heads:
                head.requires_grad_(True)
            parameters = [p for head in heads for p in head.parameters()]
            optimizer = torch.optim.SGD(
                parameters, lr=config.ca_lr, momentum=config.momentum, weight_decay=config.weight_decay
            )
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.ca_epochs)
            for epoch in range(config.ca_epochs):
                rng = world.setting.rng("slca-align", index, epoch)
                noise = [
                    torch.randn(size, config.ca_samples, len(stats[0][0]), generator=rng, dtype=torch.float64)
                    for size in sizes
                ]
                order = torch.randperm(sum(sizes) * config.ca_samples, generator=rng)
                samples = []
                for c, ((mean, cov), z) in enumerate(zip(stats, torch.cat(noise), strict=True)):
                    t = (
                        c // sizes[-1]
                        if config.official_task_index
                        else int(np.searchsorted(np.cumsum(sizes), c, "right"))
                    )
                    scale = 0.9 + 0.1 * (t + 1) / len(sizes)
                    samples.append(scale * mean + z.numpy() @ np.linalg.cholesky(cov).T)
                inputs = torch.tensor(np.concatenate(samples))[order]
                labels = torch.arange(len(stats)).repeat_interleave(config.ca_samples)[order]
                for x, y in zip(inputs.split(config.ca_samples), labels.split(config.ca_samples), strict=True):
                    parts = [head(x) for head in heads]
                    norm = sum(part.norm(p=2, dim=-1, keepdim=True) + 1e-7 for part in parts) / len(parts)
                    optimizer.zero_grad()
                    F.cross_entropy(torch.cat(parts, dim=1) / norm / config.temperature, y).backward()
                    optimizer.step()
                scheduler.step()
        arrival = [c for t in world.tasks[: index + 1] for c in t.classes.tolist()]
        with torch.no_grad():
            features = backbone(world.images)
            logits = torch.zeros(len(world.images), world.num_classes, dtype=torch.float64)
            logits[:, arrival] = torch.cat([head(features) for head in heads], dim=1)
        out.append(logits)
        heads = backup
    return out


@pytest.mark.parametrize("official_task_index", [False, True])
@pytest.mark.parametrize("backbone_scale", [0.0, 0.1])
@pytest.mark.parametrize("classes", [((0, 1), (2, 3, 4), (5,)), ((4, 0), (5, 2), (1, 3))], ids=["uneven", "scattered"])
def test_whole_run_equals_the_reference(
    classes: Sequence[Sequence[int]], backbone_scale: float, official_task_index: bool
) -> None:
    world = make_world(classes, rows_per_class=(9, 7, 3, 1, 8, 2), dtype=torch.float64)
    options = {
        "backbone_scale": backbone_scale,
        "official_task_index": official_task_index,
        "sampler": "cholesky",
        "ca_lr": 0.05,
    }
    method = make_method(world, **options)
    expected = reference_slca(world, method.config, make_method(world, **options).backbone)
    got = []
    for point in drive(method, world):
        if not point["inside"]:
            got.append(answers(method, world.images))
    for task, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0, msg=lambda text, task=task: f"task {task}: {text}")


# -- invariants of the losses ----------------------------------------------------------------------------------------
sizes_and_seed = st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 2**31))


@settings(max_examples=50, deadline=None)
@given(sizes_and_seed, st.floats(0.1, 100.0))
def test_scaling_the_logits_changes_nothing(drawn: tuple[list[int], int], factor: float) -> None:
    sizes, seed = drawn
    rng = torch.Generator().manual_seed(seed)
    logits = 1 + torch.rand(6, sum(sizes), generator=rng, dtype=torch.float64)
    targets = torch.randint(0, sum(sizes), (6,), generator=rng)
    logits.requires_grad_()
    loss = alignment_loss(logits, targets, sizes, 0.1)
    assert float(alignment_loss(logits.detach() * factor, targets, sizes, 0.1)) == pytest.approx(
        float(loss.detach()), abs=1e-4
    )
    (grad,) = torch.autograd.grad(loss, logits)
    assert float((grad * logits.detach()).sum().abs()) < 1e-5


def test_norm_is_the_mean_of_task_norms_not_the_global_one() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(mean_norm(logits, [9]), logits.norm(dim=1) + 1e-7)
    assert float((mean_norm(logits, [3, 2, 4]) - logits.norm(dim=1)).abs().min()) > 0.1


def test_all_zero_logits_of_a_task_give_finite_gradients() -> None:
    logits = torch.zeros(2, 4, requires_grad=True)
    alignment_loss(logits, torch.tensor([0, 3]), [2, 2], 0.1).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_rates() -> None:
    assert [step_rate(0.01, e, 18, 0.1) for e in (0, 17, 18, 19)] == pytest.approx([0.01, 0.01, 0.001, 0.001])
    assert step_rate(0.01, 5, 0, 0.1) == 0.01
    expected = [0.01, 0.0090450849718747, 0.0065450849718747, 0.0034549150281253, 0.00095491502812526]
    assert [cosine_rate(0.01, e, 5) for e in range(5)] == pytest.approx(expected, abs=1e-12)
    assert mean_shrink(torch.tensor([0, 1, 2, 3]), 4).tolist() == pytest.approx([0.925, 0.95, 0.975, 1.0])


# -- Gaussians -------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 2**31), st.floats(1e-2, 1e3))
def test_both_factors_are_of_one_covariance(n: int, width: int, seed: int, scale: float) -> None:
    features = scale * torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ridge = 1e-4
    mean, covariance = class_statistics(features, ridge)
    if n > 1:
        expected = np.atleast_2d(np.cov(features.numpy(), rowvar=False)) + ridge * np.eye(width)
    else:
        expected = ridge * np.eye(width)
    close = partial(torch.testing.assert_close, atol=1e-9 * scale**2, rtol=1e-9)
    close(covariance, torch.from_numpy(expected))
    for low_rank in (False, True):
        got_mean, factor = covariance_factor(features, ridge, low_rank=low_rank)
        assert torch.equal(got_mean, mean)
        assert factor.shape == (min(n, width) if low_rank else width, width)
        close(factor.mT @ factor + (ridge * torch.eye(width, dtype=torch.float64) if low_rank else 0), covariance)


@pytest.mark.parametrize("rows", [1, 2, 30])
def test_few_shot_classes_are_factored(rows: int) -> None:
    """Fewer rows than features: only the ridge makes the covariance positive."""
    world = make_world([[0, 1], [2]], rows_per_class=rows, inputs=48)
    for sampler in ("cholesky", "lowrank"):
        method = finish(make_method(world, backbone_scale=0, sampler=sampler), world)
        assert all(torch.isfinite(f).all() for f in method.factors)
        assert torch.isfinite(answers(method, world.images)).all()
        assert method.factors[0].shape == (2, 48 if sampler == "cholesky" else rows, 48)
        if rows == 1 and sampler == "cholesky":
            torch.testing.assert_close(method.factors[1][0], 1e-2 * torch.eye(48))


def test_lowrank_is_cholesky_where_a_class_has_as_many_rows_as_features() -> None:
    world = make_world([[0, 1], [2]], rows_per_class=(3, 5, 4), inputs=5)
    few, many = make_method(world, backbone_scale=0), make_method(world, backbone_scale=0, sampler="cholesky")
    finish(few, world)
    finish(many, world)
    assert torch.equal(few.factors[0], many.factors[0])  # 5 rows, 5 features
    assert few.factors[1].shape == (1, 4, 5)


@pytest.mark.parametrize("low_rank", [False, True])
def test_samples_follow_the_gaussian(low_rank: bool) -> None:
    rng = torch.Generator().manual_seed(1)
    features = torch.randn(4, 6, generator=rng, dtype=torch.float64)
    ridge = 0.05
    mean, covariance = class_statistics(features, ridge)
    _, factor = covariance_factor(features, ridge, low_rank=low_rank)
    noise = torch.randn(1, 200_000, 4 + 6 if low_rank else 6, generator=rng, dtype=torch.float64)
    samples = sample_features(mean[None], factor[None], noise, ridge)[0]
    torch.testing.assert_close(samples.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(samples.T.cov(), covariance, atol=0.03, rtol=0)


def test_not_finite_features_stop_the_run() -> None:
    world = make_world()
    world.images[3] = torch.nan
    with pytest.raises(RunFailed, match="features of task 0 are not finite"):
        finish(make_method(world, backbone_scale=0), world)


# -- invariants of the run -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backbone_scale", [0.0, 0.1])
def test_stage_1_leaves_old_heads_alone_and_recalls_them(backbone_scale: float) -> None:
    world = make_world()
    method = make_method(world, backbone_scale=backbone_scale)
    first = [0, 2, 5, 6]
    snapshot = aligned = None
    for point in drive(method, world):
        at, heads = point["at"], saved(method)["classifier"]
        start, end = first[min(at.task, 2)], first[min(at.task, 2) + 1]
        if point["phase"] == "train":
            assert all((value[end:] == 0).all() for value in heads.values())  # classes to come
            if snapshot is not None and at.task > 0:
                assert all(torch.equal(heads[key][:start], snapshot[key][:start]) for key in heads)
                assert not torch.equal(heads["weight"][start:end], snapshot["weight"][start:end])
        if point["phase"] == "statistics":
            snapshot = heads  # as they are before the alignment
        if not point["inside"]:
            assert snapshot is not None
            if at.task == 1:  # no alignment behind the first task
                assert same(heads, snapshot)
            else:
                aligned = heads
                assert not torch.equal(aligned["weight"][:start], snapshot["weight"][:start])
    assert aligned is not None


def test_weights_of_the_backbone_move_in_stage_1_alone_and_slowly() -> None:
    world = make_world()
    method = make_method(world, backbone_scale=0.01, lr=0.01, milestone=1)
    before = saved(method)["backbone"]
    for point in drive(method, world):
        now = saved(method)["backbone"]
        if point["phase"] == "train":
            assert not same(now, before)
            assert method.backbone.training
            assert method.features_version is None
            assert method.optimizer is not None
            head, backbone = method.optimizer.param_groups
            assert backbone["lr"] == pytest.approx(0.01 * head["lr"])
            last_epoch = (
                point["at"].iteration
                > iterations(world, method.phases(world.tasks[0], 0)[0], world.tasks[point["at"].task])[0]
            )
            assert head["lr"] == pytest.approx(0.001 if last_epoch else 0.01)
            assert len(head["params"][0]) == len(world.tasks[point["at"].task].classes)
        elif point["inside"]:
            assert same(now, before)  # batch-norm buffers too
            assert not method.backbone.training
            assert method.features_version == point["at"].task + 1
            assert all(not p.requires_grad for p in method.backbone.parameters())
        before = now


def test_batch_norm_can_keep_its_statistics() -> None:
    world = make_world()
    for batch_norm in ("eval", "train"):
        method = make_method(world, batch_norm=batch_norm)
        before = saved(method)["backbone"]
        after = saved(finish(method, world))["backbone"]
        assert same(before["norm.running_mean"], after["norm.running_mean"]) == (batch_norm == "eval")
        assert same(before["norm.running_var"], after["norm.running_var"]) == (batch_norm == "eval")
        assert not same(before["norm.weight"], after["norm.weight"])  # scale and shift are learned either way


def test_frozen_backbone() -> None:
    world = make_world()
    method = make_method(world, backbone_scale=0)
    assert method.frozen_backbone
    assert method.view == "features"
    assert [p.view for p in method.phases(world.tasks[1], 1)] == ["features", "features", "train"]
    assert method.features_version == 0
    assert "backbone" not in method.state_dict()
    finish(method, world)
    assert method.features_version == 0
    moving = make_method(world)
    assert (moving.frozen_backbone, moving.view, moving.features_version) == (False, "test", None)
    assert [p.view for p in moving.phases(world.tasks[0], 0)] == ["train", "test"]


def test_phases_and_steps() -> None:
    world = make_world()
    method = make_method(world, ca_epochs=3)
    names = [[p.name for p in method.phases(task, i)] for i, task in enumerate(world.tasks)]
    assert names == [["train", "statistics"], ["train", "statistics", "align"], ["train", "statistics", "align"]]
    assert [method.phases(t, i)[-1].iterations for i, t in enumerate(world.tasks)] == [None, 3 * 5, 3 * 6]
    assert [p.name for p in make_method(world, align=False).phases(world.tasks[2], 2)] == ["train"]
    for phase in method.phases(world.tasks[1], 1)[1:]:
        assert phase.updates == 1  # whatever the scenario does
    assert method.phases(world.tasks[1], 1)[1].drop_last is False


def test_statistics_of_old_classes_are_never_refreshed() -> None:
    world = make_world()
    method = make_method(world)
    kept: list[tuple[Tensor, list[Tensor]]] = []
    for point in drive(method, world):
        if not point["inside"]:
            kept.append((method.means.clone(), [f.clone() for f in method.factors]))
    ends = [2, 5, 6]
    for task, (means, factors) in enumerate(kept):
        assert len(factors) == task + 1
        assert torch.equal(method.means[: ends[task]], means[: ends[task]])
        assert same(method.factors[: task + 1], factors)
        assert (means[ends[task] :] == 0).all()


def test_every_sample_is_used_once_per_epoch_and_each_epoch_has_new_ones() -> None:
    world = make_world()
    method = make_method(world, ca_epochs=2)
    drawn: dict[tuple[int, int], Tensor] = {}
    for point in drive(method, world):
        if point["phase"] == "align":
            assert method._drawn is not None
            num_seen = method._ends[point["at"].task]
            assert method._samples.shape == (num_seen * 6, 4)
            assert method._order.sort().values.tolist() == list(range(num_seen * 6))
            drawn.setdefault(method._drawn, method._samples.clone())
            assert torch.equal(drawn[method._drawn], method._samples)
    assert sorted(drawn) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert not torch.isclose(drawn[1, 0], drawn[1, 1]).any()


def test_answers_are_raw_logits_of_the_live_heads() -> None:
    world = make_world(((3, 0), (1, 2)))
    method = finish(make_method(world, backbone_scale=0), world)
    column = {3: 0, 0: 1, 1: 2, 2: 3}
    got = answers(method, world.images)
    raw = world.images @ method.classifier.weight.T + method.classifier.bias
    torch.testing.assert_close(got, raw[:, [column[c] for c in range(4)]])
    head = method.head(None)
    assert head.bias is not None
    torch.testing.assert_close(world.images @ head.weight.T + head.bias, got)
    other = make_method(world, backbone_scale=0, temperature=0.7)
    other.load_state_dict(saved(method))
    assert torch.equal(answers(other, world.images), got)


def test_class_ids_are_only_names() -> None:
    """The same data under other class ids gives the same heads, under those ids."""
    plain, other = make_world(((0, 1), (2, 3, 4))), make_world(((3, 1), (4, 0, 2)))
    assert torch.equal(plain.images, other.images)
    a, b = finish(make_method(plain), plain), finish(make_method(other), other)
    assert same(a.classifier.state_dict(), b.classifier.state_dict())
    assert torch.equal(answers(a, plain.images), answers(b, other.images)[:, [3, 1, 4, 0, 2]])


def test_alignment_helps_where_heads_of_tasks_compete() -> None:
    world = make_world([[0, 1, 2], [3, 4, 5], [6, 7, 8]], rows_per_class=40, inputs=8, seed=3, epochs=10)
    world.images += 1.5 * torch.randn(world.images.shape, generator=torch.Generator().manual_seed(1))
    targets = torch.cat([task.targets for task in world.tasks])
    accuracy = {}
    for align in (True, False):
        method = make_method(
            world, align=align, backbone_scale=0, ca_samples=32, ca_epochs=3, ca_lr=0.05, milestone=8, lr=0.1
        )
        finish(method, world)
        accuracy[align] = float((answers(method, world.images).argmax(1) == targets).float().mean())
    assert accuracy[True] > accuracy[False] + 0.1  # 0.87 and 0.73 when this was written


@pytest.mark.parametrize("config", [{}, {"backbone_scale": 0.0}, {"sampler": "cholesky"}, {"align": False}])
def test_resume_anywhere_is_bit_identical(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slca_module, "STATISTICS_BATCH", 8)  # several steps in the statistics phase
    world = make_world(rows_per_class=4)
    checkpoints, method, losses = [], make_method(world, **config), []
    for point in drive(method, world):
        checkpoints.append(point | {"method": saved(method)})
        losses.append(point["losses"])
    final = saved(method)
    seen_phases = {p["phase"] for p in checkpoints if p["at"].iteration > 1}
    assert seen_phases == ({"train"} if config == {"align": False} else {"train", "statistics", "align"})
    for number, checkpoint in enumerate(checkpoints):
        resumed = make_method(world, **config)
        rest = [point["losses"] for point in drive(resumed, world, checkpoint)]
        assert same(saved(resumed), final), f"resumed at {checkpoint['at']} ({checkpoint['phase']})"
        assert same(rest, losses[number + 1 :])


def test_an_object_that_has_run_can_be_set_back() -> None:
    world = make_world(((0, 1), (2,)), rows_per_class=4)
    method = make_method(world, ca_epochs=1)
    checkpoints = [point | {"method": saved(method)} for point in drive(method, world)]
    final = saved(method)
    middle = next(point for point in checkpoints if point["phase"] == "align")
    assert same(saved(finish(method, world, resume=middle)), final)


def test_gaussians_are_in_full_precision_whatever_the_run_is_in() -> None:
    world = make_world()
    full = finish(make_method(world), world)
    mixed = finish(make_method(world), world, autocast=("statistics", "align"))
    assert same(saved(mixed), saved(full))
    mixed = finish(make_method(world), world, autocast=("train",))
    assert not same(saved(mixed), saved(full))


def test_memory_is_reported() -> None:
    world = make_world(((0, 1), (2,)), rows_per_class=3)
    method = finish(make_method(world, backbone_scale=0), world)
    assert method.memory_bytes() == {
        "class_means": 3 * 5 * 8,
        "class_covariances": 3 * 3 * 5 * 4,  # three rows of five features each
        "heads_before_alignment": 3 * (5 + 1) * 4,
    }
    assert make_method(world, align=False).memory_bytes() == {}


# -- bad input -------------------------------------------------------------------------------------------------------
def test_scenarios_that_do_not_fit_are_refused() -> None:
    world = make_world()
    with pytest.raises(InputError, match="online"):
        make_method(replace(world, online=True))
    again = replace(world, tasks=[*world.tasks, world.tasks[0]])
    with pytest.raises(InputError, match="do not share classes"):
        make_method(again)
    nothing_new = replace(
        world, tasks=[*world.tasks, world.tasks[0]._replace(classes=torch.tensor([], dtype=torch.int64))]
    )
    with pytest.raises(InputError, match="brings no new class"):
        make_method(nothing_new)


def test_rows_that_do_not_fit_are_refused() -> None:
    world = make_world()
    blurry = replace(world, tasks=[world.tasks[0], world.tasks[1]._replace(targets=world.tasks[1].targets % 4)])
    with pytest.raises(InputError, match="task 1 of test@1 has rows of other tasks' classes"):
        finish(make_method(blurry), blurry)
    keep = world.tasks[1].targets != 3
    missing = world.tasks[1]._replace(rows=world.tasks[1].rows[keep], targets=world.tasks[1].targets[keep])
    empty = replace(world, tasks=[world.tasks[0], missing])
    with pytest.raises(InputError, match="none of class 'c3'"):
        finish(make_method(empty), empty)
    finish(make_method(empty, align=False), empty)  # the slow learner alone needs no means


# -- recipes ---------------------------------------------------------------------------------------------------------
def recipes(name: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = tomllib.loads((RECIPES / f"{name}.toml").read_text())["recipe"]
    return entries


@pytest.mark.parametrize("name", ["slca", "nmc"])
def test_recipes_can_be_used(name: str) -> None:
    from clbench.methods.registry import find

    shape = (3, 300, 256)
    for entry in recipes(name):
        make_config(find(name).cls.Config, {entry["source"]: entry["set"]}, name)
        assert set(entry) <= {"scenario", "backbone", "backbone_options", "source", "set", "run"}
        assert set(entry["run"]) <= {"train_view", "test_view", "batch_size", "epochs"}
        for key in ("train_view", "test_view"):
            if key in entry["run"]:
                assert parse_view(entry["run"][key]).output_shape(shape) == (3, 224, 224)
        assert parse_view(entry["run"]["test_view"]).draws == 0


def test_recipes_hold_the_papers_values() -> None:
    """Table of the card, section 3."""
    table = {
        "split-cifar100": (20, 18, 0.1),
        "split-imagenet-r": (50, 40, 0.1),
        "split-cub200": (50, 40, 0.1),
        "split-cars196": (50, 40, 0.05),
    }
    for scenario, (epochs, milestone, temperature) in table.items():
        entry = next(e for e in recipes("slca") if fnmatchcase(scenario, e["scenario"]))
        config, _ = make_config(SLCAConfig, {"recipe": entry["set"]}, "slca")
        assert (entry["run"]["epochs"], config.milestone, config.temperature) == (epochs, milestone, temperature)
        assert (config.lr, config.backbone_scale, config.ca_lr, config.gamma) == (0.01, 0.01, 0.01, 0.1)
        assert (config.momentum, config.weight_decay, config.ca_epochs, config.ca_samples) == (0.9, 5e-4, 5, 256)
        assert entry["run"]["batch_size"] == 128
        assert config.official_task_index == (scenario == "split-cars196")


def test_method_is_registered() -> None:
    assert METHOD is SLCA
    assert SLCA.settings == {"class", "task"}
