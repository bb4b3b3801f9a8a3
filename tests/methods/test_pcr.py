"""PCR and HPCR against the official code's vectors (fixtures/replay.json), and the invariants of their card."""

import copy
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Flat, assert_survives_kill, equal, learner_for, make_store, run, split_scenario
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.data.classes import ClassTable
from clbench.errors import InputError, RunFailed
from clbench.evaluator import Schedule
from clbench.learner.learner import Learner
from clbench.methods._proxy import class_counts, cosine_scores, unit
from clbench.methods.base import Setting
from clbench.methods.config import make_config
from clbench.methods.hpcr import HPCR, HPCRConfig, pcd_loss, scd_loss, temperature_cycle
from clbench.methods.pcr import PCR, PCRConfig, pcr_loss
from clbench.methods.registry import find, find_recipe
from clbench.rng import generator
from clbench.scenarios.model import StreamDefaults
from clbench.stream.types import Batch, Cursor, Phase

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "fixtures" / "replay.json").read_text())["hpcr"]
ITERATIONS = [v for v in VECTORS if v["what"].startswith("One official HPCR iteration")]
TAU = 0.09


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, tensor(expected), rtol=tolerance, atol=tolerance)


def vector(words: str) -> dict[str, Any]:
    (found,) = (v for v in VECTORS if words in v["what"])
    return found


# -- the losses ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("contrast", ["proxy", "all"])
def test_official_loss_and_gradients(contrast: str) -> None:
    case = vector(f"contrast_mode={contrast}")
    features, proxies = (tensor(case["inputs"][name]).requires_grad_() for name in ("f", "W"))
    loss = pcr_loss(features, proxies, torch.tensor(case["inputs"]["y"]), case["inputs"]["tau"], contrast)
    loss.backward()
    close(loss, case["expected"]["loss"])
    close(features.grad, case["expected"]["grad_f"])
    close(proxies.grad, case["expected"]["grad_W"])


def test_official_logits() -> None:
    case = vector("cosLinear")
    close(cosine_scores(tensor(case["inputs"]["f"]), tensor(case["inputs"]["W"]), TAU), case["expected"]["logits"])


def test_official_temperature_cycle() -> None:
    case = vector("temperature multiplier")
    inputs = case["inputs"]
    found = [temperature_cycle(i, inputs["min"], inputs["max"], 500) for i in inputs["i"]]
    assert found == pytest.approx(case["expected"]["tau_s"], abs=1e-12)


def pairwise_reference(f: Tensor, w: Tensor, y: Tensor, temperature: float, contrast: str) -> Tensor:
    """SupCon over B rows and one proxy per row, with loops: the B x 2B form of the official code."""
    rows, proxies = unit(f), unit(w)[y]
    contrasts, labels = torch.cat([rows, proxies]), torch.cat([y, y])
    if contrast == "proxy":
        terms = []
        for i in range(len(f)):
            scores = rows[i] @ proxies.T / temperature
            terms.append(-(scores - scores.logsumexp(0))[y == y[i]].mean())
        return torch.stack(terms).mean()
    anchors = rows if contrast == "one" else contrasts
    terms = []
    for i in range(len(anchors)):
        scores = anchors[i] @ contrasts.T / temperature
        others = torch.arange(len(contrasts)) != i
        log_p = scores - scores[others].logsumexp(0)
        terms.append(-log_p[others & (labels == labels[i])].mean())
    return torch.stack(terms).mean()


def not_short(x: Tensor) -> Tensor:
    """Rows of length 0.5 and more: where they are as short as the eps of the cosine, its scale matters."""
    length = x.norm(dim=1, keepdim=True)
    return x / length * length.clamp(min=0.5)


batches = st.tuples(st.integers(1, 9), st.integers(2, 7), st.integers(1, 5), st.integers(0, 10_000))


@pytest.mark.parametrize("contrast", ["proxy", "one", "all"])
@settings(max_examples=40, deadline=None)
@given(drawn=batches)
def test_loss_is_the_pairwise_one(contrast: str, drawn: tuple[int, int, int, int]) -> None:
    """The O(B C) form, its gradients, and gradients of exactly 0 for the proxies of absent classes."""
    size, num_classes, width, seed = drawn
    rng = torch.Generator().manual_seed(seed)
    f, w = (not_short(torch.randn((n, width), generator=rng, dtype=torch.float64)) for n in (size, num_classes))
    y = torch.randint(0, num_classes, (size,), generator=rng)
    ours, plain = ([x.clone().requires_grad_() for x in (f, w)] for _ in range(2))
    loss, expected = pcr_loss(*ours, y, 0.3, contrast), pairwise_reference(*plain, y, 0.3, contrast)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    loss.backward(), expected.backward()
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11)
    absent = torch.ones(num_classes, dtype=torch.bool)
    absent[y] = False
    assert (ours[1].grad[absent] == 0).all()
    # a loss of directions: the gradient is orthogonal to the feature, and scale does not matter
    tangent = (ours[0].grad * f).sum(1)
    torch.testing.assert_close(tangent, torch.zeros_like(tangent), atol=1e-4, rtol=0)
    scaled = pcr_loss(f * 7, w * 0.5, y, 0.3, contrast)
    torch.testing.assert_close(scaled, loss.detach(), rtol=1e-3, atol=1e-3)


def test_multiplicity_matters() -> None:
    """A second row of a class changes the other rows' losses: a softmax over the present classes would not."""
    rng = torch.Generator().manual_seed(1)
    f = torch.randn((4, 5), generator=rng, dtype=torch.float64)
    w = torch.randn((3, 5), generator=rng, dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 2])
    plain = F.cross_entropy(cosine_scores(f, w, TAU), y)
    assert abs(float(pcr_loss(f, w, y, TAU) - plain)) > 0.1
    more = torch.cat([f, w[:1]]), torch.cat([y, y[:1]])  # a further row of class 0, on its proxy
    of_others = 5 * float(pcr_loss(more[0], w, more[1], TAU)) - float(row_loss(*more, w, 4))
    assert abs(of_others - 4 * float(pcr_loss(f, w, y, TAU))) > 0.1


def row_loss(f: Tensor, y: Tensor, w: Tensor, row: int) -> Tensor:
    """One row's part of the loss."""
    scores = cosine_scores(f[row : row + 1], w, TAU)[0][y]
    return scores.logsumexp(0) - scores[y == y[row]].mean()


def test_gradients_are_finite_at_zero() -> None:
    f, w = torch.zeros((3, 4), requires_grad=True), torch.zeros((2, 4), requires_grad=True)
    for contrast in ("proxy", "one", "all"):
        loss = pcr_loss(f, w, torch.tensor([0, 1, 1]), TAU, contrast)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(f.grad).all()
        assert torch.isfinite(w.grad).all()


def test_one_class_in_the_batch() -> None:
    """Every proxy of the contrast set is the row's own: log of their number, and nothing to learn from it."""
    f, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = pcr_loss(f, w, torch.full((4,), 2), TAU)
    loss.backward()
    assert float(loss) == pytest.approx(math.log(4), abs=1e-6)
    assert f.grad.abs().max() < 1e-5
    assert w.grad.abs().max() < 1e-5


def components() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The toy iteration of the vectors by hand: targets and features of both forward passes, in float64."""
    inputs = ITERATIONS[0]["inputs"]
    x, memory, encoder = (tensor(inputs[name]) for name in ("x", "mem_x", "E"))
    fresh, replayed = (torch.cat([v, -0.5 * v + 0.1]) @ encoder.T for v in (x, memory))
    y, mem_y = torch.tensor(inputs["y"]), torch.tensor(inputs["mem_y"])
    made = {
        "proxies": tensor(inputs["W"]), "features": torch.cat([replayed, fresh]), "replayed": replayed,
        "targets": torch.cat([mem_y, mem_y, y, y]),
        "logits": tensor(inputs["mem_logits"]).repeat(2, 1), "stored": tensor(inputs["mem_features"]).repeat(2, 1),
    }  # fmt: skip
    return vector("Component values")["expected"], made


def test_official_components() -> None:
    expected, made = components()
    proxies, replayed, targets = made["proxies"], made["replayed"], made["targets"]
    contrastive = pcr_loss(made["features"], proxies, targets, TAU)
    scores = cosine_scores(replayed, proxies, TAU)
    proxy = pcd_loss(scores, made["logits"], class_counts(targets, len(proxies), torch.float64))
    similar = scd_loss(replayed, made["stored"], TAU)
    close(contrastive, expected["L_PCR"])
    close(proxy, expected["L_PCD"])
    close(similar, expected["L_SCD"])
    close(0.5625 * contrastive + 0.1 * proxy + 0.5 * similar, expected["total_alpha0p1_beta0p5_tau_s0p5625"])
    columns = F.mse_loss(scores[:, targets], made["logits"][:, targets])  # the official form: columns with repetition
    torch.testing.assert_close(proxy, columns, rtol=1e-12, atol=0)


def test_scd_teacher_gets_no_gradient_and_pairs_are_enough() -> None:
    features = torch.randn(2, 3, requires_grad=True)
    assert float(scd_loss(features, torch.randn(2, 3), TAU)) == 0  # one other row each: certain
    features = torch.randn(6, 3, requires_grad=True, dtype=torch.float64)
    scd_loss(features, features.detach(), TAU).backward()
    assert features.grad.abs().max() < 1e-9  # cross entropy is least where both agree


# -- one official iteration through the method -----------------------------------------------------------------------
class Encoder(nn.Module):
    """z = E x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.num_features = len(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def toy(config: HPCRConfig | PCRConfig, inputs: dict[str, Any], cls: type[PCR] = HPCR) -> tuple[PCR, Batch]:
    """The vectors' world: rows 0.. are the memory, then the stream batch; view `train` is -0.5 x + 0.1."""
    pixels = torch.cat([tensor(inputs["mem_x"]), tensor(inputs["x"])])

    def read(rows: Tensor, domain: Tensor | None = None, view: str = "train", rng: Any = None) -> Tensor:
        return pixels[rows] if view == "raw" else -0.5 * pixels[rows] + 0.1

    num_classes, count = len(inputs["W"]), len(inputs["mem_y"])
    table = ClassTable(
        tuple(map(str, range(num_classes))), torch.zeros(num_classes).long(), torch.full((num_classes,), -1)
    )
    device = torch.device("cpu")
    setting = Setting(
        classes=table, classes_per_task=None, task_classes=(torch.arange(num_classes),), image_shape=(6,),
        image_bytes=6,
        device=device, scenario_id="toy@1", setting="class", online=True, epochs=1, batch_size=3, updates_per_batch=1,
        prompts={}, read=read, rng=partial(generator, 0, device=device),
    )  # fmt: skip
    method = cls(config, Encoder(tensor(inputs["E"])), setting)
    method.proxies.double()
    method.proxies.weight.data.copy_(tensor(inputs["W"]))
    payload = {"logits": tensor(inputs["mem_logits"]), "features": tensor(inputs["mem_features"])}
    method.buffer.add(
        torch.arange(count), torch.tensor(inputs["mem_y"]), generator(0, "x"), **(payload if cls is HPCR else {})
    )
    rows = torch.arange(count, len(pixels))
    batch = Batch(
        read(rows), torch.tensor(inputs["y"]), rows, None, torch.ones(num_classes, dtype=torch.bool),
        Cursor(inputs["task_index"], 0, 0, 0, 0), Phase("train"), 0,
    )  # fmt: skip
    return method, batch


@pytest.mark.parametrize("case", ITERATIONS, ids=lambda c: f"beta={c['inputs']['beta']}")
def test_official_iteration(case: dict[str, Any]) -> None:
    inputs, expected = case["inputs"], case["expected"]
    method, batch = toy(HPCRConfig(lr=inputs["lr"], alpha=inputs["alpha"], beta=inputs["beta"], capacity=7), inputs)
    method.step(batch)
    # what is stored with an exemplar is float32
    close(method.backbone.weight.detach(), expected["E"], 1e-6)
    close(method.proxies.weight.detach(), expected["W"], 1e-6)
    stored = method.buffer.take(torch.arange(4, 7))
    assert torch.equal(stored.rows, batch.rows)
    assert torch.equal(stored.targets, batch.targets)
    close(stored.payload["logits"].double(), expected["saved_logits"], 1e-6)
    close(stored.payload["features"].double(), expected["saved_features"], 1e-6)


def test_first_task_has_no_distillation() -> None:
    """Task 0 equals alpha = beta = 0, and with a factor of 1 it is PCR."""
    inputs = {**ITERATIONS[0]["inputs"], "task_index": 0}
    ends = []
    for config in (HPCRConfig(alpha=0.1, beta=0.5, capacity=7), HPCRConfig(alpha=0.0, beta=0.0, capacity=7)):
        method, batch = toy(config, inputs)
        method.step(batch)
        ends.append(method.backbone.weight.detach())
    assert torch.equal(*ends)
    later, batch = toy(HPCRConfig(alpha=0.1, beta=0.5, capacity=7), {**inputs, "task_index": 1})
    later.step(batch)
    assert not torch.equal(later.backbone.weight, ends[0])
    flat, batch = toy(HPCRConfig(scale_min=1.0, scale_max=1.0, capacity=7), inputs)
    pcr, _ = toy(PCRConfig(capacity=7), inputs, PCR)
    flat.step(batch), pcr.step(batch)
    assert torch.equal(flat.backbone.weight, pcr.backbone.weight)
    assert torch.equal(flat.proxies.weight, pcr.proxies.weight)


# -- in a run --------------------------------------------------------------------------------------------------------
class Normed(nn.Module):
    """Backbone with batch norm."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(36, 8), nn.BatchNorm1d(8)

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.norm(self.layer(images.flatten(1))))


def online(cls: type[PCR], *, store: Any = None, backbone: Any = Normed, tasks: int = 3, **values: Any) -> Learner:
    scenario = split_scenario(
        store or make_store(), tasks, online=True, defaults=StreamDefaults(batch_size=5, drop_last=True)
    )
    config = cls.Config(**{"replay_batch_size": 4, **values})
    views = {"train": "pad_crop(1) flip", "test": ""}
    return learner_for(scenario, cls, config=config, backbone=backbone, views=views, schedule=Schedule(0), store=store)


def steps(learner: Learner, count: int) -> Learner:
    """Drive the first task's first steps."""
    plan, at = learner.plans()[0][0], learner.at
    for step in range(count):
        batch = learner.stream.batch(plan, at._replace(iteration=step, step=step))
        learner.method.step(batch)
    return learner


@pytest.mark.parametrize("cls", [PCR, HPCR])
def test_first_iteration_moves_batch_norm_only(cls: type[PCR]) -> None:
    learner = online(cls)
    before = copy.deepcopy(learner.method.backbone.state_dict())
    proxies = learner.method.proxies.weight.clone()
    steps(learner, 1)
    after = learner.method.backbone.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert torch.equal(proxies, learner.method.proxies.weight)
    assert int(after["norm.num_batches_tracked"]) == 1
    steps(online(cls), 2)


@pytest.mark.parametrize("cls", [PCR, HPCR])
def test_two_forward_passes_of_40_rows(cls: type[PCR]) -> None:
    """Stream and replay have batch statistics of their own: one pass over all rows gives other features."""
    seen: list[Tensor] = []
    learner = steps(online(cls, capacity=50), 3)
    method = learner.method
    hook = method.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    counted = int(method.backbone.norm.num_batches_tracked)
    plan = learner.plans()[0][0]
    batch = learner.stream.batch(plan, learner.at._replace(iteration=3, step=3))
    method.step(batch)
    hook.remove()
    assert [len(images) for images in seen] == [10, 8]
    assert int(method.backbone.norm.num_batches_tracked) == counted + 2
    stream, replay = seen
    assert torch.equal(stream[5:], batch.images)
    assert torch.equal(stream[:5], learner.stream.read(batch.rows, None, "test"))
    assert not torch.equal(stream[:5], stream[5:])
    assert not torch.equal(replay[:4], replay[4:])
    method.backbone.train()
    apart = torch.cat([method.backbone(stream), method.backbone(replay)])
    assert not torch.allclose(apart, method.backbone(torch.cat([stream, replay])), atol=1e-4)


def test_stored_logits_are_never_refreshed() -> None:
    learner = steps(online(HPCR, capacity=50), 2)
    buffer = learner.method.buffer
    first = buffer.take(torch.arange(5))
    kept = {name: value.clone() for name, value in first.payload.items()}
    plan = learner.plans()[0][0]
    for step in range(2, 4):
        learner.method.step(learner.stream.batch(plan, learner.at._replace(iteration=step, step=step)))
    assert equal(kept, buffer.take(torch.arange(5)).payload)
    assert learner.method.memory_bytes() == {"buffer": 50 * (36 + 8 + 4 * (6 + 8))}


def test_cycle_starts_anew_in_each_task() -> None:
    """The factor follows the batch number inside the task; over a task's length it begins at its least."""
    learner = online(HPCR, period=4, scale_min=0.25, scale_max=1.0, alpha=0.0, beta=0.0)
    run(learner)
    steps_, ids, values = learner.losses.table()
    names = learner.losses.names
    loss = {int(s): float(v) for s, i, v in zip(steps_, ids, values, strict=True) if names[i] == "loss"}
    pcr = {int(s): float(v) for s, i, v in zip(steps_, ids, values, strict=True) if names[i] == "pcr"}
    found = [loss[s] / pcr[s] for s in sorted(loss)]
    one_task = [0.25, 0.625, 1.0, 0.625]
    assert found == pytest.approx((one_task * 3)[1:], abs=1e-5)  # the very first batch has nothing to replay


@pytest.mark.parametrize(
    ("cls", "values"), [(PCR, {}), (PCR, {"contrast": "all"}), (HPCR, {}), (HPCR, {"reservoir": "exact"})]
)
def test_survives_kill(cls: type[PCR], values: dict[str, Any]) -> None:
    whole = assert_survives_kill(
        lambda **changes: replace_saving(online(cls, capacity=7, **values), **changes), at_most=6
    )
    assert whole.method.buffer.num_seen == 60


def replace_saving(learner: Learner, save: Any = None, checkpoint_steps: int | None = None) -> Learner:
    if save is not None:
        learner._save, learner._checkpoint_steps = save, checkpoint_steps
    return learner


@pytest.mark.parametrize("cls", [PCR, HPCR])
def test_learns(cls: type[PCR]) -> None:
    """On one task of all classes it tells them apart, which untrained features do not."""
    store = make_store()
    scenario = split_scenario(store, 1, defaults=StreamDefaults(batch_size=6, epochs=60))
    learner = run(learner_for(scenario, cls, backbone=Flat, config=cls.Config(capacity=72), schedule=Schedule(0)))
    hits = learner.matrix[-1][1].sum()
    assert hits / len(scenario.groups[0].rows) > 0.8


# -- bad input -------------------------------------------------------------------------------------------------------
def test_without_memory_nothing_would_be_learned() -> None:
    for cls in (PCR, HPCR):
        with pytest.raises(InputError, match=r"'capacity' .* is 0, it must be between 1"):
            make_config(cls.Config, {"--set": {"capacity": "0"}}, "method pcr")


@pytest.mark.parametrize("cls", [PCR, HPCR])
def test_memory_larger_than_the_data_and_than_a_class(cls: type[PCR]) -> None:
    learner = run(online(cls, capacity=1000))
    assert len(learner.method.buffer) == learner.method.buffer.num_seen == 60
    assert torch.isfinite(learner.method.backbone.layer.weight).all()
    tight = run(online(cls, capacity=1))
    assert len(tight.method.buffer) == 1
    assert torch.isfinite(tight.method.proxies.weight).all()


@pytest.mark.parametrize("cls", [PCR, HPCR])
def test_a_class_with_one_sample_and_batches_of_one_class(cls: type[PCR]) -> None:
    store = make_store()
    scenario = split_scenario(store, 3, online=True, defaults=StreamDefaults(batch_size=5))
    first, second, third = scenario.tasks
    order = second.targets.argsort(stable=True)  # one class after the other
    single = torch.cat([(third.targets == 4).nonzero()[:, 0], (third.targets == 5).nonzero()[:1, 0]])
    tasks = (
        first,
        second._replace(rows=second.rows[order], targets=second.targets[order]),
        third._replace(rows=third.rows[single], targets=third.targets[single]),
    )
    learner = run(learner_for(replace(scenario, tasks=tasks), cls, store=store, schedule=Schedule(0)))
    assert learner.at.task == 3
    assert all(torch.isfinite(p).all() for p in learner.method.backbone.parameters())


@pytest.mark.parametrize("cls", [PCR, HPCR])
def test_an_empty_first_task(cls: type[PCR]) -> None:
    """No row, no step: the second task starts with an empty memory, and HPCR distils from it on."""
    store = make_store()
    scenario = split_scenario(store, 3, online=True, defaults=StreamDefaults(batch_size=5))
    empty = scenario.tasks[0]._replace(rows=torch.zeros(0).long(), targets=torch.zeros(0).long())
    scenario = replace(scenario, tasks=(empty, *scenario.tasks[1:]))
    learner = run(learner_for(scenario, cls, store=store, schedule=Schedule(0)))
    assert learner.method.buffer.num_seen == 48
    assert ("scd" in learner.losses.names) == (cls is HPCR)


@pytest.mark.parametrize("cls", [PCR, HPCR])
def test_a_broken_loss_is_named(cls: type[PCR]) -> None:
    with pytest.raises(RunFailed, match="loss became nan at step 2"):
        run(online(cls, backbone=Broken))


class Broken(Flat):
    """Features that are not numbers."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) / 0 * 0


def test_the_task_setting_is_refused() -> None:
    assert find("PCR").cls.settings == find("h-pcr").cls.settings == {"class", "domain"}


def test_recipes_are_the_official_ones() -> None:
    for method, name, alpha in (("pcr", "cifar100", None), ("hpcr", "cifar100", 0.1), ("hpcr", "cifar10", 0.01)):
        recipe = find_recipe(find(method), f"online-split-{name}@1")
        assert recipe is not None
        assert recipe.backbone == "reduced-resnet18"
        assert (recipe.set["lr"], recipe.set["temperature"], recipe.set.get("alpha")) == (0.1, 0.09, alpha)
        assert recipe.run["train_view"].startswith("random_resized_crop(32,scale=0.2:1) flip color_jitter")
