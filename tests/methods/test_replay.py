"""ER-ACE, DER++ and DER against the official code's vectors (fixtures/replay.json), and their card's invariants."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Flat, assert_survives_kill, learner_for, make_store, run, split_scenario
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import RunFailed
from clbench.evaluator import Schedule
from clbench.learner.learner import Learner
from clbench.methods._softmax import SoftmaxMethod
from clbench.methods.der import DER
from clbench.methods.derpp import DERPP, derpp_loss
from clbench.methods.er import ER
from clbench.methods.erace import ERACE, kept_classes
from clbench.methods.finetune import Finetune
from clbench.methods.registry import find, find_recipe
from clbench.scenarios.model import StreamDefaults

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "fixtures" / "replay.json").read_text())["online"]
METHODS = [ER, ERACE, DERPP, DER]


def vector(words: str) -> dict[str, Any]:
    (found,) = (v for v in VECTORS if words in v["what"])
    return found


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- the losses ------------------------------------------------------------------------------------------------------
def ace(logits: Tensor, targets: Tensor, seen: Tensor | None) -> Tensor:
    kept = kept_classes(targets, logits.shape[1], seen)
    return F.cross_entropy(logits.masked_fill(~kept, -torch.inf), targets)


def test_official_ace_masks() -> None:
    case = vector("ER-ACE incoming loss")
    logits, targets = tensor(case["inputs"]["logits"]), torch.tensor(case["inputs"]["y"])
    seen = torch.zeros(logits.shape[1], dtype=torch.bool)
    seen[case["inputs"]["seen"]] = True
    assert kept_classes(targets, logits.shape[1], seen).double().tolist() == case["expected"]["mask_row"]
    assert float(ace(logits, targets, seen)) == pytest.approx(case["expected"]["loss"], abs=1e-12)


def test_strict_ace() -> None:
    case = vector("strict paper form")
    found = ace(tensor(case["inputs"]["logits"]), torch.tensor(case["inputs"]["y"]), None)
    assert float(found) == pytest.approx(case["expected"]["loss"], abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=6), st.lists(st.integers(0, 7), max_size=6), st.integers(0, 9999)
)
def test_absent_classes_get_no_gradient(targets: list[int], before: list[int], seed: int) -> None:
    """Exactly none, though their logits were largest; official masking keeps those from the largest seen upwards."""
    logits = torch.randn((len(targets), 8), generator=torch.Generator().manual_seed(seed)).mul_(20).requires_grad_()
    y = torch.tensor(targets)
    seen = torch.zeros(8, dtype=torch.bool)
    seen[targets + before] = True
    for mask, kept in ((None, set(targets)), (seen, set(targets) | set(range(max(targets + before), 8)))):
        logits.grad = None
        ace(logits, y, mask).backward()
        absent = [c for c in range(8) if c not in kept]
        assert (logits.grad[:, absent] == 0).all()
        assert torch.isfinite(logits.grad).all()
        assert kept_classes(y, 8, mask).nonzero()[:, 0].tolist() == sorted(kept)


def test_official_derpp_loss() -> None:
    case = vector("DER++")
    inputs = {name: torch.tensor(v) if name.startswith("y") else v for name, v in case["inputs"].items()}
    recalled = tensor(inputs["o1"]), tensor(inputs["stored_logits1"])
    assert float(F.mse_loss(*recalled)) == pytest.approx(case["expected"]["mse"], abs=1e-12)
    loss = derpp_loss(
        F.cross_entropy(tensor(inputs["cur"]), inputs["y"]), recalled,
        F.cross_entropy(tensor(inputs["o2"]), inputs["y2"]), inputs["alpha"], inputs["beta"],
    )  # fmt: skip
    assert float(loss) == pytest.approx(case["expected"]["loss"], abs=1e-12)


# -- in a run --------------------------------------------------------------------------------------------------------
class Normed(nn.Module):
    """Backbone with batch norm."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(36, 8), nn.BatchNorm1d(8)

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.norm(self.layer(images.flatten(1))))


def online(cls: type[SoftmaxMethod], *, backbone: Any = Normed, tasks: int = 3, scenario: Any = None, **values: Any):
    scenario = scenario or split_scenario(
        make_store(), tasks, online=True, defaults=StreamDefaults(batch_size=5, drop_last=True)
    )
    if "capacity" in cls.Config.__dataclass_fields__:
        values = {"replay_batch_size": 4, **values}
    views = {"train": "pad_crop(1) flip", "test": ""}
    return learner_for(scenario, cls, config=cls.Config(**values), backbone=backbone, views=views, schedule=Schedule(0))


def weights(learner: Learner) -> list[Tensor]:
    method = learner.method
    assert isinstance(method, SoftmaxMethod)
    return [*method.backbone.state_dict().values(), *method.classifier.state_dict().values()]


def same(a: Learner, b: Learner) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


@pytest.mark.parametrize("cls", [ER, DERPP, DER])
def test_without_memory_it_is_finetuning(cls: type[SoftmaxMethod]) -> None:
    assert same(run(online(cls, capacity=0)), run(online(Finetune)))


def test_ace_without_memory_trains_the_classes_of_each_batch() -> None:
    learner = run(online(ERACE, capacity=0))
    assert not same(learner, run(online(Finetune)))
    assert learner.losses.names == ["stream_loss"]


@pytest.mark.parametrize("draws", ["two", "one"])
def test_derpp_without_logits_is_er(draws: str) -> None:
    """alpha = 0: the second draw alone. Drawn as ER draws it, the whole run is ER's."""
    er, derpp = run(online(ER, capacity=20)), run(online(DERPP, capacity=20, alpha=0.0, draws=draws))
    close = [torch.allclose(x, y, atol=1e-4) for x, y in zip(weights(er), weights(derpp), strict=True)]
    assert all(close) == (draws == "two")


def test_derpp_variants_differ() -> None:
    """Draws and forward passes each change the run; a memory of one exemplar gives it to both batches."""
    made = [
        run(online(DERPP, capacity=20, draws=draws, forward=forward))
        for draws in ("two", "one")
        for forward in ("apart", "together")
    ]
    assert not any(same(a, b) for i, a in enumerate(made) for b in made[:i])
    for draws in ("two", "one"):
        tight = run(online(DERPP, capacity=1, draws=draws, backbone=Flat))
        assert len(tight.method.buffer) == 1
        assert all(torch.isfinite(w).all() for w in weights(tight))


def test_halves_of_one_draw() -> None:
    learner = online(DERPP, capacity=20, draws="one", replay_batch_size=4)
    method = learner.method
    for held, expected in ((1, (1, 1, 0)), (5, (3, 3, 0)), (8, (4, 4, 0)), (19, (4, 4, 0))):
        method.buffer.num_seen = held
        first, second = method.sample(0)
        assert (len(first), len(second)) == expected[:2]
        shared = set(first.slots.tolist()) & set(second.slots.tolist())
        assert len(shared) == (held % 2 if held < 8 else 0)


def test_der_is_derpp_with_beta_0() -> None:
    assert same(run(online(DER, capacity=20)), run(online(DERPP, capacity=20, beta=0.0)))
    assert find("DER++").id == "derpp"
    assert find("der").id == "der"


def test_derpp_keeps_the_logits_of_the_stream_pass() -> None:
    """Augmented, in train mode, before the update; all C of them, and never refreshed."""
    learner = online(DERPP, capacity=50)
    method, plan = learner.method, learner.plans()[0][0]
    batch = learner.stream.batch(plan, learner.at)
    twin = online(DERPP, capacity=50).method
    expected = twin.classifier(twin.backbone(batch.images)).detach()
    method.step(batch)
    kept = method.buffer.take(torch.arange(5)).payload["logits"]
    torch.testing.assert_close(kept, expected)
    assert torch.equal(method.buffer.rows, batch.rows)
    for step in (1, 2):
        method.step(learner.stream.batch(plan, learner.at._replace(iteration=step, step=step)))
    assert torch.equal(kept, method.buffer.take(torch.arange(5)).payload["logits"])
    assert method.memory_bytes() == {"buffer": 50 * (36 + 8 + 4 * 6)}


def test_ace_knows_what_has_come_not_what_will() -> None:
    """The official rule counts the classes of past batches, not all those of the task that has begun."""
    learner = online(ERACE, masking="official", backbone=Flat)
    method, plan = learner.method, learner.plans()[1][0]
    for step in range(2):
        batch = learner.stream.batch(plan, learner.at._replace(task=1, iteration=step, step=step))
        targets = torch.tensor([2 + step])
        method.step(batch._replace(rows=batch.rows[:1], targets=targets, images=batch.images[:1]))
        assert method.seen.nonzero()[:, 0].tolist() == [2, 3][: step + 1]


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_heads_of_ace(head: str) -> None:
    learner = run(online(ERACE, head=head))
    method = learner.method
    features = torch.randn(4, 8)
    logits = method.classify(features, torch.ones(6, dtype=torch.bool), None)
    kind, weight, bias, scale, _ = method.head(None)
    assert kind == head
    by_head = F.linear(features, weight, bias)
    if head == "cosine":
        assert scale == 10
        by_head = 10 * F.cosine_similarity(features[:, None], weight[None], dim=2)
        assert logits.abs().max() <= 10
    torch.testing.assert_close(logits, by_head, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("setting", ["class", "task"])
@pytest.mark.parametrize(
    ("cls", "values"),
    [(ERACE, {"masking": "official", "head": "cosine"}), (DERPP, {}), (DERPP, {"draws": "one", "forward": "together"})],
)
def test_survives_kill(cls: type[SoftmaxMethod], values: dict[str, Any], setting: str) -> None:
    scenario = split_scenario(
        make_store(), 3, online=True, setting=setting, defaults=StreamDefaults(batch_size=5, updates_per_batch=2)
    )

    def make(save: Any = None, checkpoint_steps: int | None = None) -> Learner:
        learner = online(cls, scenario=scenario, capacity=7, **values)
        if save is not None:
            learner._save, learner._checkpoint_steps = save, checkpoint_steps
        return learner

    whole = assert_survives_kill(make, at_most=4)
    assert whole.method.buffer.num_seen == 72


@pytest.mark.parametrize("cls", METHODS)
def test_forgets_less_than_finetuning(cls: type[SoftmaxMethod]) -> None:
    scenario = split_scenario(make_store(), 3, defaults=StreamDefaults(batch_size=6, epochs=30))
    config = cls.Config(lr=0.05, **({"alpha": 1.0} if cls is DER else {}))
    ours, bare = (
        run(learner_for(scenario, which, backbone=Flat, config=values, schedule=Schedule(0)))
        for which, values in ((cls, config), (Finetune, Finetune.Config(lr=0.05)))
    )
    assert ours.matrix[-1][1][:2].sum() > bare.matrix[-1][1][:2].sum() + 4  # of 24 test rows of the first two tasks


# -- bad input -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cls", METHODS)
def test_memory_larger_than_the_data(cls: type[SoftmaxMethod]) -> None:
    learner = run(online(cls, capacity=1000))
    assert len(learner.method.buffer) == 60
    assert all(torch.isfinite(w).all() for w in weights(learner))


@pytest.mark.parametrize("cls", METHODS)
def test_single_samples_single_classes_and_an_empty_first_task(cls: type[SoftmaxMethod]) -> None:
    scenario = split_scenario(make_store(), 3, online=True, defaults=StreamDefaults(batch_size=5))
    first, second, third = scenario.tasks
    order = second.targets.argsort(stable=True)
    single = torch.cat([(third.targets == 4).nonzero()[:, 0], (third.targets == 5).nonzero()[:1, 0]])
    tasks = (
        first._replace(rows=first.rows[:0], targets=first.targets[:0]),
        second._replace(rows=second.rows[order], targets=second.targets[order]),
        third._replace(rows=third.rows[single], targets=third.targets[single]),
    )
    learner = run(online(cls, backbone=Flat, scenario=replace(scenario, tasks=tasks)))
    assert learner.at.task == 3
    assert learner.method.buffer.num_seen == 24 + 13
    assert all(torch.isfinite(w).all() for w in weights(learner))


class Broken(Flat):
    """Features that are not numbers."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) / 0 * 0


@pytest.mark.parametrize("cls", METHODS)
def test_a_broken_loss_is_named(cls: type[SoftmaxMethod]) -> None:
    with pytest.raises(RunFailed, match="loss became nan at step 1"):
        run(online(cls, backbone=Broken))


def test_recipes() -> None:
    for method in ("erace", "derpp"):
        for name, capacity in (("cifar100", 1000), ("cifar10", 200)):
            recipe = find_recipe(find(method), f"online-split-{name}@1")
            assert recipe is not None
            assert recipe.backbone == "reduced-resnet18"
            assert recipe.run["mask"] == "all"
            assert recipe.set["capacity"] == capacity
    assert find("er-ace").id == "erace"
