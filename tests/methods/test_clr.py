"""CLR against the vectors of its card, against a plain reference of the whole algorithm, and the card's invariants."""

import copy
import json
import math
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PER_CLASS, Flat, assert_survives_kill, equal, learner_for, make_store, run, split_scenario
from torch import Tensor, nn
from torch.nn import functional as F

import clbench.methods.clr as clr_module
from clbench.backbones import build
from clbench.data.views import parse_view
from clbench.errors import InputError, RunFailed
from clbench.evaluator import Schedule
from clbench.learner.hostreads import forbid_host_reads
from clbench.learner.learner import Learner
from clbench.learner.resolve import resolve
from clbench.learner.run import weights_digest
from clbench.learner.spec import RunSpec
from clbench.methods.clr import (
    CLR,
    CLRConfig,
    Reprogrammed,
    batch_norms,
    identity_kernel,
    kernel_behind,
    norm_penalty,
    pack_size,
    reprogram,
    step_rate,
)
from clbench.methods.config import make_config
from clbench.scenarios.model import Scenario, StreamDefaults

VECTORS = json.loads((Path(__file__).parent / "fixtures" / "clr.json").read_text())["vectors"]
RECIPES = Path(clr_module.__file__).parent / "recipes" / "clr.toml"
VARIANTS = ["clr", "full", "v2"]
NO_CURVE = Schedule(0)


# -- a small world ---------------------------------------------------------------------------------------------------
class Small(nn.Module):
    """The network of the vectors: conv3x3, bn, relu, conv1x1, bn, relu, mean over the map."""

    def __init__(self, channels: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 3, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 4, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.num_features = 4
        self.to(dtype)
        with torch.no_grad():  # a pretrained network's: no mean 0, variance 1, scale 1, shift 0
            for norm in (self.bn1, self.bn2):
                for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                    tensor.add_(0.3 * torch.rand_like(tensor))

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(self.bn1.weight.dtype)
        x = F.relu(self.bn1(self.conv1(images)))
        return F.relu(self.bn2(self.conv2(x))).mean((2, 3))


def timm_network(name: str, size: int = 32) -> nn.Module:
    return build(name, in_shape=(1, size, size), seed=0, pretrained=False)


def task_scenario(tasks: int = 3, *, val: bool = False, size: int = 6, **changes: Any) -> Scenario:
    """Task-incremental; `val` keeps each fourth training row out for validation."""
    scenario = split_scenario(make_store(6, size), tasks, setting="task", **changes)
    if val:
        cut = []
        for task in scenario.tasks:
            held = torch.arange(len(task.rows)) % 4 == 0
            rest = task._replace(rows=task.rows[~held], targets=task.targets[~held])
            cut.append(rest._replace(val=(task.rows[held], task.targets[held])))
        scenario = replace(scenario, tasks=tuple(cut))
    return scenario


def make(scenario: Scenario, *, size: int = 6, backbone: Callable[[], nn.Module] = Small, **options: Any) -> Learner:
    config = CLRConfig(**options.pop("config", {}))
    return learner_for(scenario, CLR, store=make_store(6, size), backbone=backbone, config=config, **options)


def images_of(scenario: Scenario, task: int, learner: Learner) -> Tensor:
    return learner.stream.read(scenario.groups[task].rows, None, "test")


def answers(learner: Learner, task: int) -> Tensor:
    """Eval logits of a task's test images by that task."""
    method, scenario = learner.method, learner.scenario
    with torch.no_grad():
        return method.logits(images_of(scenario, task, learner), scenario.tasks[task].classes, task)


# -- vectors ---------------------------------------------------------------------------------------------------------
def test_vector_identity_initialisation() -> None:
    case = VECTORS[0]
    weight = torch.tensor(case["inputs"]["conv_weight"])
    conv = nn.Conv2d(2, 3, 3, stride=case["inputs"]["stride"], padding=case["inputs"]["padding"], bias=False)
    conv.weight.data = weight
    block = Reprogrammed(conv, 3)
    assert torch.equal(block.kernel, torch.tensor(case["expected"]["init_kernel"]))
    x = torch.tensor(case["inputs"]["x"])
    out = block(x)
    assert torch.equal(out, conv(x))
    torch.testing.assert_close(out, torch.tensor(case["expected"]["block_out"]), atol=1e-6, rtol=0)
    torch.testing.assert_close(conv(x), torch.tensor(case["expected"]["frozen_out"]), atol=1e-6, rtol=0)


def test_vector_scale_of_v2() -> None:
    expected = torch.tensor(VECTORS[1]["expected"]["init"])
    assert torch.equal(identity_kernel(len(expected), kernel_behind(nn.Conv2d(2, 3, 1), "v2")), expected)


@pytest.mark.parametrize(("case", "variant"), [(VECTORS[2], "clr"), (VECTORS[3], "v2")])
def test_vector_which_parameters_are_trained(case: dict[str, Any], variant: str) -> None:
    learner = make(task_scenario(), backbone=partial(Small, 2), config={"variant": variant})
    method = learner.method
    task = learner.scenario.tasks[0]
    method.begin_phase(task, method.phases(task, 0)[0], learner.at)
    method.open_phase(task, method.phases(task, 0)[0], learner.at)

    parameters = dict(method.backbone.named_parameters())
    ours = {"Ghos_Mod.0.weight": "kernel", "original_block.weight": "conv.weight"}

    def name(theirs: str) -> str:
        for old, new in ours.items():
            theirs = theirs.replace(old, new)
        return theirs

    shapes = {n: list(p.shape) for n, p in parameters.items() if p.requires_grad}
    heads = dict(zip(("fc.weight", "fc.bias"), (list(rows.shape) for rows in method._rows), strict=True))
    expected = {name(key): shape for key, shape in case["expected"]["trainable"].items()}
    assert shapes | heads == expected
    assert {n for n, p in parameters.items() if not p.requires_grad} == {name(n) for n in case["expected"]["frozen"]}

    trained = [p for group in method.optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in trained) == case["expected"]["n_trainable"]
    in_penalty = len(method._lengths) + len(method._rows) + len(method._frozen)
    assert in_penalty == case["expected"]["n_tensors_in_norm_penalty"]
    norms = [p.norm() for n, p in parameters.items() if p.requires_grad or name(n) in map(name, shapes)]
    norms += [p.norm() for n, p in parameters.items() if ".conv." in n] + [rows.norm() for rows in method._rows]
    assert len(norms) == in_penalty
    torch.testing.assert_close(method._frozen_norms + method._norm_sum(), torch.stack(norms).sum())


@pytest.mark.parametrize("index", [0, 1])
def test_vector_numbers_per_task(index: int) -> None:
    inputs, expected = VECTORS[4]["inputs"], VECTORS[4]["expected"]
    with torch.device("meta"):
        network = timm.create_model(inputs["anchors"][index], num_classes=0)
    sizes = {variant: pack_size(network, variant) for variant in VARIANTS}
    assert sizes["clr"].learned == expected["reduced_v1"][index]
    assert sizes["clr"].total == expected["reduced_v1_with_running"][index]
    assert sizes["full"].learned == expected["base"][index]
    assert sizes["v2"].learned == expected["reduced_v2"][index]
    anchor = sum(p.numel() for p in network.parameters())
    assert anchor == inputs["backbone_params"][index]
    percent = 100 * sizes["clr"].total / anchor
    assert percent == pytest.approx(expected["percent_reduced_v1_with_running"][index], abs=1e-12)
    assert percent < 0.6
    assert sizes["clr"].kernels == 9 * inputs["C3x3_and_stem"][index]
    assert sizes["clr"].affine == sizes["clr"].statistics == 2 * inputs["C_bn"][index]
    assert sizes["v2"].kernels == sizes["clr"].kernels + inputs["C1x1"][index]

    blocks = reprogram(network, "clr")
    assert sum(block.kernel.numel() for block in blocks) == sizes["clr"].kernels


# -- the parts -------------------------------------------------------------------------------------------------------
def test_no_1x1_convolution_of_resnet18_is_wrapped() -> None:
    with torch.device("meta"):
        network = timm.create_model("resnet18", num_classes=0)
    assert len(reprogram(network, "clr")) == 17  # the stem and two in each of 8 blocks
    bare = {n for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and not n.endswith(".conv")}
    assert bare == {f"layer{i}.0.downsample.0" for i in (2, 3, 4)}
    with torch.device("meta"):
        assert len(reprogram(timm.create_model("resnet18", num_classes=0), "full")) == 20


def test_depthwise_convolutions_are_wrapped_too() -> None:
    with torch.device("meta"):
        network = timm.create_model("mobilenetv2_100", num_classes=0)
    blocks = reprogram(network, "clr")
    assert len(blocks) == 18  # the stem and one in each of 17 blocks
    assert sum(block.conv.groups > 1 for block in blocks) == 17


def test_a_convolution_that_stands_in_two_places_is_wrapped_once() -> None:
    conv = nn.Conv2d(3, 3, 3)
    network = nn.Sequential(conv, nn.Sequential(conv))
    (block,) = reprogram(network, "clr")
    assert network[0] is block
    assert network[1][0] is block


convolutions = st.fixed_dictionaries({
    "kernel_size": st.sampled_from([1, 2, 3, (1, 3), 5, 7]), "stride": st.integers(1, 3), "padding": st.integers(0, 3),
    "dilation": st.integers(1, 2), "bias": st.booleans(),
})  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(convolutions, st.integers(0, 5), st.sampled_from([1, 3]))
def test_a_kernel_changes_its_own_channel_alone_and_no_size(options: dict[str, Any], channel: int, size: int) -> None:
    conv = nn.Conv2d(3, 6, groups=3, **options)
    block = Reprogrammed(conv, size)
    x = torch.randn(2, 3, 16, 15)
    before = block(x)
    assert torch.equal(before, conv(x))
    with torch.no_grad():
        block.kernel[channel] += torch.randn(1, size, size)
    after = block(x)
    assert after.shape == before.shape
    others = torch.arange(6) != channel
    assert torch.equal(after[:, others], before[:, others])
    assert not torch.equal(after[:, channel], before[:, channel])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_norm_penalty_is_the_sum_of_norms(lengths: list[int], data: st.DataObject) -> None:
    zero = data.draw(st.integers(-1, len(lengths) - 1))
    pieces = [torch.randn(n, dtype=torch.float64) * (i != zero) for i, n in enumerate(lengths)]
    flat = torch.cat(pieces).requires_grad_()
    penalty = norm_penalty(flat, torch.tensor(lengths))
    torch.testing.assert_close(penalty, torch.stack([piece.norm() for piece in pieces]).sum())
    penalty.backward()
    expected = torch.cat([piece / piece.norm() if i != zero else piece for i, piece in enumerate(pieces)])
    torch.testing.assert_close(flat.grad, expected)


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 9, 60])
def test_rate_is_the_official_schedulers(epochs: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, max(epochs // 3, 1), gamma=0.1)
    for epoch in range(epochs):
        assert step_rate(0.5, epoch, epochs, 0.1) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


NETWORKS = {"small": (Small, 6), **{n: (partial(timm_network, n), 32) for n in ("resnet10t", "mobilenetv2_035")}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", NETWORKS)
def test_at_the_start_the_network_is_the_anchor(name: str, variant: str) -> None:
    network, size = NETWORKS[name]
    anchor = network()
    wrapped = copy.deepcopy(anchor)
    expected = pack_size(wrapped, variant)
    learner = make(task_scenario(size=size), size=size, backbone=lambda: wrapped, config={"variant": variant})
    method, images = learner.method, images_of(learner.scenario, 0, learner)
    assert method.packs.shape == (3, expected.total)
    assert method._flat.numel() == 0
    with torch.no_grad():
        for task in range(3):
            assert torch.equal(method.features(images, task), anchor.eval()(images))
            assert not method.logits(images, torch.arange(6) < 2, task).any()  # a head of zeros


# -- the whole algorithm against a plain one -------------------------------------------------------------------------
def reference_task(
    learner: Learner, index: int, variant: str, config: CLRConfig, head: Sequence[Tensor]
) -> Iterator[tuple[nn.Module, Sequence[Tensor], int]]:
    """One task as the card lists it, with PyTorch's own optimiser, scheduler and autograd: after each epoch the
    network, the head and the validation hits. Batches are the learner's."""
    network = copy.deepcopy(learner.network)
    kernels = []
    for name in ("conv1", "conv2"):
        conv = getattr(network, name)
        conv.requires_grad_(False)
        size = kernel_behind(conv, variant)
        if size:
            layer = nn.Conv2d(conv.out_channels, conv.out_channels, size, padding=size // 2, groups=conv.out_channels,
                              bias=False, dtype=torch.float64)  # fmt: skip
            nn.init.dirac_(layer.weight, groups=conv.out_channels)
            kernels.append(layer)
            setattr(network, name, nn.Sequential(conv, layer))
    weight, bias = (rows.clone().requires_grad_() for rows in head)
    in_blocks = [p for m in network.children() if isinstance(m, nn.Sequential) for p in m.parameters()]
    affine = [p for norm in (network.bn1, network.bn2) for p in norm.parameters()]
    trained = [weight, bias, *affine, *(layer.weight for layer in kernels)]
    optimizer = torch.optim.Adam(trained, lr=config.lr)
    epochs = learner.stream.epochs
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, max(epochs // 3, 1), gamma=config.gamma)
    task = learner.scenario.tasks[index]
    plan = learner.plans()[index][0]
    first = int(task.classes[0])
    for epoch in range(epochs):
        network.train()
        for i in range(plan.per_epoch):
            batch = learner.stream.batch(plan, learner.at._replace(task=index, iteration=epoch * plan.per_epoch + i))
            loss = F.cross_entropy(F.linear(network(batch.images), weight, bias), batch.targets - first)
            for p in (weight, bias, *affine, *in_blocks):
                loss = loss + config.penalty * p.norm()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        network.eval()
        hits = 0
        if task.val is not None:
            with torch.no_grad():
                logits = F.linear(network(learner.stream.read(task.val[0], None, "test")), weight, bias)
            hits = int((logits.argmax(1) == task.val[1] - first).sum())
        yield network, (weight, bias), hits


@pytest.mark.parametrize("val", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_is_the_plain_algorithm(variant: str, val: bool) -> None:
    """In float64, with penalty, schedule, running statistics, and the best epoch where there are validation rows."""
    network = Small(dtype=torch.float64)
    config = CLRConfig(variant=variant, lr=0.05, penalty=0.01)
    scenario = task_scenario(val=val, defaults=StreamDefaults(batch_size=5, epochs=6))
    learner = learner_for(scenario, CLR, store=make_store(6), backbone=lambda: copy.deepcopy(network), config=config,
                          schedule=NO_CURVE)  # fmt: skip
    learner.network = network
    run(learner)
    chosen = []
    for index in range(3):
        rng, bound = learner.method.setting.rng("clr-head", index), 1 / math.sqrt(4)
        head = [
            torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound, generator=rng) for shape in ((2, 4), (2,))
        ]
        best, kept, logits = -1, 0, torch.zeros(0)
        images = images_of(scenario, index, learner)
        for epoch, (trained, (weight, bias), hits) in enumerate(reference_task(learner, index, variant, config, head)):
            if not val or hits > best:
                best, kept = hits, epoch
                with torch.no_grad():
                    logits = F.linear(trained(images), weight, bias)
        chosen.append(kept)
        torch.testing.assert_close(answers(learner, index)[:, scenario.tasks[index].classes], logits)
    assert not val or min(chosen) < 5  # selection had something to choose


def test_patience_ends_a_task_early() -> None:
    def steps(**config: Any) -> list[int]:
        scenario = task_scenario(val=True, defaults=StreamDefaults(batch_size=6, epochs=12))
        learner = run(make(scenario, config={"lr": 0.0, **config}, schedule=NO_CURVE))
        return [b - a for a, b in zip(learner.task_starts, [*learner.task_starts[1:], learner.at.step], strict=True)]

    per_epoch = 2 * PER_CLASS * 3 // 4 // 6
    # rate 0: nothing but running statistics moves; the count of epochs behind the best one ends the task
    assert steps(patience=2, batch_norm="eval") == [(1 + 3) * per_epoch] * 3
    assert steps(patience=21, batch_norm="eval") == [12 * per_epoch] * 3
    assert steps(patience=0, batch_norm="eval", selection="last") == [12 * per_epoch] * 3


def test_the_probe_is_clr_with_kernels_and_batch_norms_frozen() -> None:
    class Frozen(CLR):
        """CLR whose packs never move."""

        def open_phase(self, task: Any, phase: Any, at: Any) -> None:
            super().open_phase(task, phase, at)
            self.optimizer.param_groups[0]["params"].pop(0)

    network = Small()
    scenario = task_scenario(defaults=StreamDefaults(batch_size=6, epochs=4))
    config = {"lr": 0.05, "batch_norm": "eval"}
    frozen = learner_for(scenario, Frozen, store=make_store(6), backbone=lambda: copy.deepcopy(network),
                         config=CLRConfig(**config), schedule=NO_CURVE)  # fmt: skip
    before = frozen.method.packs.clone()
    run(frozen)
    assert torch.equal(frozen.method.packs, before)

    probe = make(scenario, backbone=lambda: copy.deepcopy(network), config={**config, "variant": "linear"})
    attach(probe, network)
    run(probe)
    assert probe.method.packs.shape == (3, 0)
    for ours, theirs in zip(probe.method.classifier.parameters(), frozen.method.classifier.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        assert ours.abs().sum() > 0
    assert list(probe.method.memory_bytes()) == ["heads"]


def attach(learner: Learner, network: nn.Module) -> None:
    """Features of the anchor, as a run would keep them."""
    read, still = learner.stream.read, copy.deepcopy(network).eval()

    def features(rows: Tensor, domain: Tensor | None) -> Tensor:
        with torch.no_grad():
            return still(read(rows, domain, "test"))

    read.features = features


# -- invariants ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "variant"), [*(("small", v) for v in VARIANTS), ("resnet10t", "full"), ("mobilenetv2_035", "clr")]
)
def test_nothing_is_forgotten_and_the_anchor_stays(name: str, variant: str) -> None:
    kept: list[tuple[Tensor, Tensor]] = []

    class Watched(CLR):
        def end_phase(self, task: Any, phase: Any, at: Any) -> None:
            for module in self.backbone.modules():
                if isinstance(module, nn.Conv2d):
                    assert all(p.grad is None and not p.requires_grad for p in module.parameters())
            super().end_phase(task, phase, at)
            kept.append((answers(learner, at.task), self.packs[at.task].clone()))

    network, size = NETWORKS[name]
    anchor = network()
    scenario, config = task_scenario(size=size), CLRConfig(variant=variant, lr=0.02)
    learner = learner_for(scenario, Watched, store=make_store(6, size), backbone=lambda: copy.deepcopy(anchor),
                          config=config, schedule=NO_CURVE)  # fmt: skip
    method = learner.method
    run(learner)
    for task, (logits, pack) in enumerate(kept):
        assert torch.equal(answers(learner, task), logits)
        assert torch.equal(method.packs[task], pack)
    assert len({float(pack.sum()) for _, pack in kept}) == 3  # the tasks did learn packs of their own
    hits = torch.stack([hits for _, hits in learner.matrix])  # (tasks, groups): nothing is evaluated ahead of the run
    for task in range(3):
        assert (hits[task:, task] == hits[task, task]).all()

    state = method.backbone.state_dict()  # behind the run the network is the anchor again
    for key, value in anchor.state_dict().items():
        found = next((state[k] for k in (key, key.replace(".weight", ".conv.weight")) if k in state), None)
        if "num_batches_tracked" not in key:
            assert found is not None, key
            assert torch.equal(found, value), key


def test_running_statistics_are_the_tasks_own() -> None:
    learner = make(task_scenario(), schedule=NO_CURVE)
    method, statistics = learner.method, learner.method._size.learned
    before = method.packs[:, statistics:].clone()
    run(learner)
    assert (method.packs[:, statistics:] != before).any(dim=1).all()
    assert not torch.equal(method.packs[0, statistics:], method.packs[1, statistics:])


def test_batch_norm_eval_keeps_the_anchors_statistics() -> None:
    learner = make(task_scenario(), config={"batch_norm": "eval"}, schedule=NO_CURVE)
    method, statistics = learner.method, learner.method._size.learned
    before = method.packs.clone()
    run(learner)
    assert torch.equal(method.packs[:, statistics:], before[:, statistics:])
    assert (method.packs[:, :statistics] != before[:, :statistics]).any(dim=1).all()


@pytest.mark.parametrize("variant", [*VARIANTS, "linear"])
def test_tasks_do_not_depend_on_each_other(variant: str) -> None:
    """The last task alone, as a machine of its own would train it, gives the same bits as the whole stream."""
    network = Small()

    def one() -> Learner:
        learner = make(task_scenario(val=True), backbone=lambda: copy.deepcopy(network), config={"variant": variant},
                       schedule=NO_CURVE)  # fmt: skip
        attach(learner, network)
        return learner

    whole, alone = run(one()), one()
    alone.at = alone.at._replace(task=2)
    alone.task_starts = [0, 0]
    run(alone)
    assert torch.equal(whole.method.packs[2], alone.method.packs[2])
    for ours, theirs in zip(whole.method.classifier.parameters(), alone.method.classifier.parameters(), strict=True):
        assert torch.equal(ours[4:], theirs[4:])


def test_answers_of_another_task_leave_training_as_it_is() -> None:
    learner = make(task_scenario())
    method, task = learner.method, learner.scenario.tasks[1]
    at = learner.at._replace(task=1)
    method.begin_phase(task, method.phases(task, 1)[0], at)
    method.open_phase(task, method.phases(task, 1)[0], at)
    before = method.backbone.conv1.kernel.data_ptr()
    answers(learner, 0)
    assert method.backbone.conv1.kernel.data_ptr() == before
    assert method.packs[1].data_ptr() == before


def test_no_host_reads() -> None:
    learner = make(task_scenario(val=True))
    learner.guard = forbid_host_reads
    run(learner)
    assert learner.at.task == 3


def test_class_order_of_a_task_is_free() -> None:
    """Heads are rows in order of arrival; answers are in order of class ids."""
    scenario = task_scenario()
    mixed = [torch.tensor([4, 1]), torch.tensor([0, 5]), torch.tensor([3, 2])]
    tasks, groups = [], []
    for index, classes in enumerate(mixed):
        rows = torch.cat([task.rows[torch.isin(task.targets, classes)] for task in scenario.tasks])
        targets = make_store(6).labels[rows]
        tasks.append(scenario.tasks[index]._replace(rows=rows, targets=targets, classes=classes))
        asked = torch.cat([g.rows[torch.isin(g.targets, classes)] for g in scenario.groups])
        groups.append(scenario.groups[index]._replace(rows=asked, targets=make_store(6).labels[asked], classes=classes))
    scenario = replace(scenario, tasks=tuple(tasks), groups=tuple(groups), defaults=StreamDefaults(6, epochs=30))
    learner = run(make(scenario, config={"lr": 0.03}, schedule=NO_CURVE))
    for index, classes in enumerate(mixed):
        others = torch.ones(6, dtype=torch.bool)
        others[classes] = False
        assert not answers(learner, index)[:, others].any()
    assert learner.matrix[-1][1].sum() > 0.8 * 36  # chance is half
    head = learner.method.head(0)
    with torch.no_grad():
        features = learner.method.features(images_of(scenario, 0, learner), 0)
        logits = F.linear(features, head.weight, head.bias)
    torch.testing.assert_close(logits[:, mixed[0]], answers(learner, 0)[:, mixed[0]])


# -- kill and resume -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", [*VARIANTS, "linear"])
def test_survives_kill(variant: str) -> None:
    network = Small()

    def one(**options: Any) -> Learner:
        scenario = task_scenario(val=True, defaults=StreamDefaults(batch_size=5, epochs=3))
        config = {"variant": variant, "patience": 1, "lr": 0.03}
        learner = make(
            scenario, config=config, backbone=lambda: copy.deepcopy(network), schedule=Schedule(3), **options
        )
        attach(learner, network)
        return learner

    whole = assert_survives_kill(one, at_most=6)
    again = run(one())
    assert weights_digest(whole.method) == weights_digest(again.method)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_035"])
def test_survives_kill_with_networks_of_timm(name: str) -> None:
    network = timm_network(name)
    scenario = task_scenario(2, size=32, defaults=StreamDefaults(batch_size=12, epochs=1))

    def one(**options: Any) -> Learner:
        return make(scenario, size=32, backbone=lambda: copy.deepcopy(network), schedule=Schedule(4), **options)

    assert_survives_kill(one, at_most=3)


def test_a_resumed_network_has_the_same_weights() -> None:
    """Also where the last checkpoint lies behind the last step, and nothing more is run."""
    saved: list[dict[str, Any]] = []
    network = Small()

    def one(**options: Any) -> Learner:
        return make(task_scenario(), backbone=lambda: copy.deepcopy(network), **options)

    whole = run(one(save=lambda state: saved.append(copy.deepcopy(state))))
    resumed = one()
    resumed.load_state_dict(saved[-1])
    run(resumed)
    assert weights_digest(resumed.method) == weights_digest(whole.method)
    assert "backbone" not in saved[-1]["method"]  # the anchor is not copied into checkpoints
    assert equal(answers(resumed, 0), answers(whole, 0))


# -- memory, bad input, recipes --------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_per_task_is_the_closed_form(variant: str) -> None:
    learner = make(task_scenario(), config={"variant": variant}, schedule=NO_CURVE)
    run(learner)
    kernels = {"clr": 9 * 3, "full": 9 * (3 + 4), "v2": 9 * 3 + 4}[variant]
    for trained, memory in enumerate(learner.memory, 1):
        assert memory == {
            "kernels": trained * 4 * kernels,
            "batch_norm_affine": trained * 4 * 2 * 7,
            "batch_norm_statistics": trained * 4 * 2 * 7,
            "heads": trained * 4 * (2 * 4 + 2),
        }
    assert set(make(task_scenario()).method.memory_bytes().values()) == {0}


class NoNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.num_features = 4

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).mean((2, 3))


def pointwise() -> nn.Module:
    network = Small()
    network.conv1 = nn.Conv2d(1, 3, 1)
    return network


def cumulative() -> nn.Module:
    network = Small()
    network.bn2.momentum = None
    return network


@pytest.mark.parametrize(
    ("backbone", "variant", "words"),
    [
        (Flat, "clr", "backbone Flat has no 2-d convolution with a kernel above 1x1"),
        (Flat, "full", "backbone Flat has no 2-d convolution: choose"),
        (pointwise, "clr", "no 2-d convolution with a kernel above 1x1"),
        (NoNorm, "v2", "learns batch norms for each task, but backbone NoNorm has none"),
        (cumulative, "clr", "batch norms with a momentum"),
        (lambda: build("vit-tiny-32", in_shape=(1, 8, 8), seed=0), "clr", "backbone vit-tiny-32 has none"),
    ],
)
def test_networks_without_the_layers_are_refused(backbone: Callable[[], nn.Module], variant: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        make(task_scenario(), backbone=backbone, config={"variant": variant})
    assert "variant=linear" in str(caught.value)


def test_the_probe_takes_any_network() -> None:
    assert make(task_scenario(), backbone=Flat, config={"variant": "linear"}).method.view == "features"


def test_scenarios_without_tasks_of_their_own_are_refused() -> None:
    scenario = task_scenario()
    shared = [task._replace(classes=torch.arange(2)) for task in scenario.tasks]
    with pytest.raises(InputError, match="a class of an earlier task"):
        make(replace(scenario, tasks=tuple(shared)))
    wrong = scenario.tasks[0]._replace(targets=scenario.tasks[0].targets + 2)
    with pytest.raises(InputError, match="rows of other tasks' classes"):
        run(make(replace(scenario, tasks=(wrong, *scenario.tasks[1:]))))
    with pytest.raises(InputError, match="method clr works in the task-incremental setting"):
        resolve(RunSpec(method="clr", scenario="split-digits"))
    with pytest.raises(RunFailed, match="every test group must belong to one task"):
        make(scenario).method.logits(torch.zeros(1, 1, 6, 6), torch.ones(6, dtype=torch.bool), None)


def test_selection_on_validation_rows_needs_them() -> None:
    with pytest.raises(InputError, match="val_share"):
        make(task_scenario(), config={"selection": "val"}).plans()


def test_a_last_batch_of_one_image_is_left_out() -> None:
    def plan(batch_size: int, **config: Any) -> int:
        scenario = task_scenario(defaults=StreamDefaults(batch_size=batch_size, epochs=1))
        return make(scenario, config=config).plans()[0][0].per_epoch

    rows = 2 * PER_CLASS
    assert (plan(rows - 1), plan(rows - 2), plan(rows)) == (1, 2, 1)
    assert plan(rows - 1, batch_norm="eval") == plan(rows - 1, variant="linear") == 2
    with pytest.raises(InputError, match="need two images"):
        plan(1)
    assert plan(1, batch_norm="eval") == rows


def test_recipes_resolve() -> None:
    recipes = tomllib.loads(RECIPES.read_text())["recipe"]
    assert recipes
    for recipe in recipes:
        make_config(CLRConfig, {"recipe": recipe["set"]}, "clr")
        for key in ("train_view", "test_view"):
            view = parse_view(recipe["run"][key])
            assert not view.random  # the paper trains without augmentation
            assert view.output_shape((3, 64, 64))[1:] in ((64, 64), (224, 224))


def test_batch_norms_of_timm_are_found() -> None:
    with torch.device("meta"):
        network = timm.create_model("mobilenetv2_100", num_classes=0)
    assert len(batch_norms(network)) == 52
    assert any(type(norm) is not nn.BatchNorm2d for norm in batch_norms(network))  # with an activation inside
