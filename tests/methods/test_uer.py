"""UER against the vectors of its card, the card's invariants (section 7), and its switches."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import assert_survives_kill, learner_for, make_store, run, split_scenario
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.data.classes import ClassTable
from clbench.errors import InputError
from clbench.learner.learner import Learner
from clbench.methods.base import Head, Setting
from clbench.methods.registry import describe_file, find
from clbench.methods.uer import METHOD as UER
from clbench.methods.uer import cosine_logits, dot_logits
from clbench.rng import generator
from clbench.stream.types import Batch, Cursor, Phase

COSINE, COSINE_10, DOT, TOTAL = json.loads((Path(__file__).parent / "fixtures" / "uer.json").read_text())
exact = partial(torch.testing.assert_close, atol=1e-12, rtol=0)


def tensors(case: dict) -> dict[str, Tensor]:
    """Inputs of a vector: float64, labels int64."""
    return {
        name: torch.tensor(value, dtype=torch.int64 if name.startswith("y") else torch.float64)
        for name, value in case["inputs"].items()
    }


class Identity(nn.Module):
    """Features are the images."""

    num_features = 5

    def forward(self, images: Tensor) -> Tensor:
        return images


def method_on(exemplars: Tensor, weight: Tensor, **hyperparameters: object) -> UER:
    """UER over given features of exemplars, with a given head, in float64. Row i of the store is exemplar i."""
    classes = len(weight)
    table = ClassTable(tuple(map(str, range(classes))), torch.zeros(classes).long(), torch.full((classes,), -1))
    setting = Setting(
        classes=table, classes_per_task=None, task_classes=(torch.arange(classes),), image_shape=(5,), image_bytes=5,
        device=torch.device("cpu"), scenario_id="test@1", setting="class", online=True, epochs=1, batch_size=4,
        updates_per_batch=1, prompts={}, read=lambda rows, *a, **k: exemplars[rows], rng=partial(generator, 0),
    )  # fmt: skip
    method = UER(UER.Config(lr=1.0, **hyperparameters), Identity(), setting)
    method.classifier.double()
    method.classifier.weight.data.copy_(weight)
    return method


def one_step(method: UER, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    seen = torch.ones(len(method.classifier.weight), dtype=torch.bool)
    at = Cursor(0, 0, 0, 0, 0)
    batch = Batch(images, targets, torch.arange(len(targets)), None, seen, at, Phase("train"), 0)
    return dict(method.step(batch))


@pytest.mark.parametrize("case", [COSINE, COSINE_10], ids=["s=1", "s=10"])
def test_cosine_logits_match_the_vectors(case: dict) -> None:
    given = tensors(case)
    logits = cosine_logits(given["z"], given["W"], case["inputs"]["scale"])
    exact(logits, torch.tensor(case["expected"]["logits"], dtype=torch.float64))
    assert F.cross_entropy(logits, given["y"]).item() == pytest.approx(case["expected"]["loss"], abs=1e-12)


def test_dot_logits_match_the_vector() -> None:
    given = tensors(DOT)
    logits = dot_logits(given["z"], given["W"], given["b"])
    exact(logits, torch.tensor(DOT["expected"]["logits"], dtype=torch.float64))
    assert F.cross_entropy(logits, given["y"]).item() == pytest.approx(DOT["expected"]["loss"], abs=1e-12)


def test_a_whole_step_matches_the_vector() -> None:
    """Loss and gradient of W from the method's own step (rate 1), gradients of the features from its losses."""
    given, expected = tensors(TOTAL), TOTAL["expected"]
    method = method_on(given["z_mem"], given["W"], cosine_scale=1.0, capacity=6, replay_batch_size=10)
    method.buffer.add(torch.arange(6), given["y_mem"], generator(0, "fill"))
    losses = one_step(method, given["z_cur"], given["y_cur"])
    assert sum(value.item() for value in losses.values()) == pytest.approx(expected["loss"], abs=1e-9)
    gradient = given["W"] - method.classifier.weight.detach()
    torch.testing.assert_close(gradient, torch.tensor(expected["grad_W"], dtype=torch.float64), atol=1e-9, rtol=0)

    z_cur, z_mem = given["z_cur"].requires_grad_(), given["z_mem"].requires_grad_()
    stream = F.cross_entropy(cosine_logits(z_cur, given["W"], 1.0), given["y_cur"])
    (stream + F.cross_entropy(dot_logits(z_mem, given["W"]), given["y_mem"])).backward()
    exact(z_cur.grad, torch.tensor(expected["grad_z_cur"], dtype=torch.float64))
    exact(z_mem.grad, torch.tensor(expected["grad_z_mem"], dtype=torch.float64))
    assert (z_cur.grad * z_cur).sum(1).abs().max() < 1e-15  # dot_zcur_gradzcur of the vector


@given(st.integers(0, 10_000), st.floats(0.1, 20.0))
def test_angles_and_norms(seed: int, scale: float) -> None:
    """o = |z| |w| cos; the stream's gradients are orthogonal to z and w; a longer W changes the replay loss alone."""
    rng = torch.Generator().manual_seed(seed)
    z, w = (torch.randn(n, 5, generator=rng, dtype=torch.float64, requires_grad=True) for n in (7, 4))
    y = torch.randint(0, 4, (7,), generator=rng)
    product = z.norm(dim=1)[:, None] * w.norm(dim=1) * cosine_logits(z, w, 1.0)
    exact(dot_logits(z, w), product)
    stream = F.cross_entropy(cosine_logits(z, w, scale), y)
    for tensor, gradient in zip((z, w), torch.autograd.grad(stream, (z, w)), strict=True):
        assert (tensor * gradient).sum(1).abs().max() < 1e-12
    longer = 3 * w
    assert F.cross_entropy(cosine_logits(z, longer, scale), y).item() == pytest.approx(stream.item(), abs=1e-12)
    replay, replay_longer = (F.cross_entropy(dot_logits(z, v), y).item() for v in (w, longer))
    assert abs(replay - replay_longer) > 1e-6


def test_without_memory_norms_change_only_at_second_order() -> None:
    """|w - lr g|^2 = |w|^2 + lr^2 |g|^2 where g is orthogonal to w; with a memory it is not."""
    given = tensors(TOTAL)
    growth = {}
    for capacity in (0, 6):
        method = method_on(given["z_mem"], given["W"], capacity=capacity)
        method.buffer.add(torch.arange(6), given["y_mem"], generator(0, "fill"))
        losses = one_step(method, given["z_cur"], given["y_cur"])
        assert ("replay_loss" in losses) == (capacity > 0)
        after, step = method.classifier.weight.detach(), method.classifier.weight.detach() - given["W"]
        growth[capacity] = after.square().sum(1) - given["W"].square().sum(1) - step.square().sum(1)
    assert growth[0].abs().max() < 1e-12
    assert growth[6].abs().max() > 1e-3


def test_both_terms_move_the_same_weights() -> None:
    given = tensors(TOTAL)
    method = method_on(given["z_mem"], given["W"], stream_weight=0.0)
    method.buffer.add(torch.arange(6), given["y_mem"], generator(0, "fill"))
    one_step(method, given["z_cur"], given["y_cur"])
    assert ((method.classifier.weight.detach() - given["W"]).abs().amax(1) > 1e-3).all()
    assert [name for name, _ in method.classifier.named_parameters()] == ["weight"]


def test_a_vector_of_zeros_has_cosine_zero_and_a_finite_gradient() -> None:
    z = torch.zeros(2, 5, requires_grad=True)
    logits = cosine_logits(z, torch.randn(3, 5, generator=generator(0, "w")), 10.0)
    assert logits.abs().max() == 0
    F.cross_entropy(logits, torch.tensor([0, 2])).backward()
    assert torch.isfinite(z.grad).all()
    assert z.grad.abs().max() < 100


@pytest.mark.parametrize("predictor", ["dot", "cosine"])
@pytest.mark.parametrize("bias", [False, True])
def test_answers_and_head_agree(predictor: str, bias: bool) -> None:
    method = method_on(torch.zeros(1, 5), tensors(DOT)["W"], predictor=predictor, bias=bias)
    z = tensors(DOT)["z"]
    head = method.head(None)
    assert isinstance(head, Head)
    assert head.kind == {"dot": "linear", "cosine": "cosine"}[predictor]
    logits = method.classify(z, torch.ones(6, dtype=torch.bool), None)
    if predictor == "cosine":
        exact(logits, head.scale * F.normalize(z, dim=1) @ F.normalize(head.weight, dim=1).T)
    else:
        exact(logits, F.linear(z, head.weight, head.bias))
    assert (method.classifier.bias is not None) == bias


def tiny(inputs: str, **options: object) -> Learner:
    config = UER.Config(lr=0.05, capacity=20, replay_batch_size=4, inputs=inputs)
    scenario = split_scenario(make_store(), online=True)
    return learner_for(scenario, UER, config=config, views={"train": "flip(1)", "test": ""}, **options)


@pytest.mark.parametrize("inputs", ["train", "raw", "both"])
def test_inputs_are_those_of_the_switch(inputs: str) -> None:
    learner = tiny(inputs)
    method, stream = learner.method, learner.stream
    plan = learner.plans()[0][0]
    for iteration in range(2):
        batch = stream.batch(plan, Cursor(0, 0, iteration, 0, iteration))
        drawn = method.draw(batch)
        method.keep(batch)
    raw = stream.read(batch.rows, None, "test")
    expected = {"train": [raw.flip(3)], "raw": [raw], "both": [raw, raw.flip(3)]}[inputs]
    assert torch.equal(drawn.batch.images, torch.cat(expected))
    assert torch.equal(drawn.batch.targets, batch.targets.repeat(len(expected)))
    assert len(drawn.images) == len(drawn.targets) == 4 * len(expected)
    if inputs == "both":
        assert torch.equal(drawn.images[:4].flip(3), drawn.images[4:])


@pytest.mark.parametrize("inputs", ["train", "raw", "both"])
def test_survives_a_kill(inputs: str) -> None:
    assert_survives_kill(partial(tiny, inputs), at_most=5)


def test_learns_and_is_not_er() -> None:
    """More right answers than chance on separable classes, and other weights than ER's from the same seed."""
    whole = run(tiny("train"))
    assert whole.matrix[-1][1].sum() > 36 / 6 * 2
    er = find("er").cls
    scenario, views = split_scenario(make_store(), online=True), {"train": "flip(1)", "test": ""}
    other = run(learner_for(scenario, er, config=er.Config(lr=0.05, capacity=20, replay_batch_size=4), views=views))
    assert not torch.equal(whole.method.classifier.weight, other.method.classifier.weight)


def test_head_only_training_takes_the_training_view_alone() -> None:
    config = UER.Config(train="head", inputs="both")
    with pytest.raises(InputError, match="uer with train=head reads kept features"):
        learner_for(split_scenario(make_store()), UER, config=config)


def test_is_labelled_a_reimplementation() -> None:
    assert "reimplementation" in describe_file(Path(find("uer").path))["title"]
