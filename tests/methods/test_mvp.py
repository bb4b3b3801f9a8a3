"""MVP against the official formulas, its closed-form gradients against autograd, and what the card says must hold."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Flat, assert_survives_kill, equal, learner_for, make_store, outcome, run, split_scenario
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import InputError
from clbench.learner.graphed_step import check_graphable
from clbench.learner.learner import Learner
from clbench.methods.mvp import (
    METHOD as MVP,
)
from clbench.methods.mvp import (
    choose_prompts,
    embed,
    feature_divisor,
    focal_loss,
    ignore_scores,
    masked_logits,
    own_gradients,
    prompt_contrast,
    prompted,
    query_of,
)
from clbench.rng import generator

VECTORS = json.loads((Path(__file__).parent / "fixtures" / "mvp.json").read_text())
VECTOR, PICKS = VECTORS["mvp"][0], VECTORS["mvp_prompt_selection"][0]
SMALL = {"prompts": 3, "general_length": 2, "expert_length": 3}
ALL = torch.ones(6, dtype=torch.bool)


def transformer(depth: int = 6) -> nn.Module:
    """A small one of timm's, for 6 px images in 3 px patches, with width 8."""
    from timm.models.vision_transformer import VisionTransformer

    net = VisionTransformer(
        img_size=6, patch_size=3, in_chans=1, num_classes=0, embed_dim=8, depth=depth, num_heads=2, weight_init=""
    )
    net.num_features = 8
    return net


def learner(scenario=None, **changes) -> Learner:
    scenario = scenario or split_scenario(make_store(), online=True)
    return learner_for(scenario, MVP, backbone=transformer, config=MVP.Config(**{**SMALL, **changes}))


def tensor(name: str, of=VECTOR) -> Tensor:
    return torch.tensor(of[name])


# -- parity ----------------------------------------------------------------------------------------------------------
def vector_parts() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """features, weight, bias, mask, targets, open classes."""
    mask = 2 * tensor("mask_raw").sigmoid()
    open_classes = torch.arange(4) < VECTOR["n_seen"]
    return tensor("features"), tensor("W"), tensor("bias"), mask, tensor("y"), open_classes


def test_the_mask_is_the_vectors() -> None:
    assert torch.allclose(vector_parts()[3], tensor("mask_applied"), atol=1e-6)


def test_gradient_rows_and_ignore_scores_are_the_vectors() -> None:
    features, weight, bias, mask, targets, open_classes = vector_parts()
    logits = masked_logits(F.linear(features, weight, bias), mask, open_classes)
    own, batch = own_gradients(features, logits, mask, targets)
    assert torch.allclose(own, tensor("gradient_rows_sample"), atol=1e-6)
    assert torch.allclose(batch, tensor("gradient_rows_batch"), atol=1e-6)
    assert torch.allclose(ignore_scores(features, logits, mask, targets), tensor("ignore_score"), atol=1e-6)


def test_losses_are_the_vectors() -> None:
    features, weight, bias, mask, targets, open_classes = vector_parts()
    divisor = feature_divisor(features, weight, targets, VECTOR["margin"])
    assert torch.allclose(divisor, tensor("afs_denominator"), atol=1e-6)
    logits = masked_logits(F.linear(features / divisor[:, None], weight, bias), mask, open_classes)
    losses = F.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(losses, tensor("per_sample_ce_after_afs"), atol=1e-6)
    ignored, alpha, gamma = tensor("ignore_score"), VECTOR["alpha"], VECTOR["gamma"]
    released = focal_loss(losses, ignored, alpha, gamma)
    assert float(released) == pytest.approx(VECTOR["loss_released_code_without_contrastive"], abs=1e-6)
    intended = focal_loss(losses, ignored, alpha, gamma, "intended")
    assert float(intended) == pytest.approx(VECTOR["loss_if_per_sample_weighting_was_intended"], abs=1e-6)


def test_the_method_puts_them_together() -> None:
    """`classifier_loss` on the vector's head, mask and features gives the vector's losses."""
    features, weight, bias, _, targets, open_classes = vector_parts()
    for form, name in (
        ("released", "loss_released_code_without_contrastive"),
        ("intended", "loss_if_per_sample_weighting_was_intended"),
    ):
        method = learner(focal=form).method
        method.classifier = nn.Linear(3, 4)
        method.pool.mask = nn.Parameter(tensor("mask_raw"))
        with torch.no_grad():
            method.classifier.weight.copy_(weight)
            method.classifier.bias.copy_(bias)
        loss = method.classifier_loss(features, torch.arange(4), targets, open_classes)
        assert loss.item() == pytest.approx(VECTOR[name], abs=1e-6)


def test_prompt_selection_and_contrast_are_the_vectors() -> None:
    query, keys, counts = tensor("query", PICKS), tensor("keys", PICKS), tensor("count", PICKS)
    choice = choose_prompts(query, keys, counts)
    assert torch.allclose(choice.distance, tensor("cosine_distance", PICKS), atol=1e-6)
    assert torch.allclose(choice.distance * (counts + 1), tensor("scaled_distance", PICKS), atol=1e-6)
    assert choice.picked.tolist() == PICKS["selected"]
    contrast = prompt_contrast(choice, keys, counts)
    assert float(contrast) == pytest.approx(PICKS["contrastive_loss_Sep2023_code"], abs=1e-6)


def test_pairs_matter_only_where_usage_differs() -> None:
    query, keys = tensor("query", PICKS), tensor("keys", PICKS)
    level = torch.full((4,), 2.0)
    choice = choose_prompts(query, keys, level)
    both = [prompt_contrast(choice, keys, level, pairwise) for pairwise in (True, False)]
    assert torch.allclose(*both)
    uneven = tensor("count", PICKS)
    choice = choose_prompts(query, keys, uneven)
    both = [prompt_contrast(choice, keys, uneven, pairwise) for pairwise in (True, False)]
    assert not torch.allclose(*both)


# -- the card's invariants (section 6) -------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(2, 6), st.booleans(), st.integers(0, 2**31))
def test_closed_form_gradients_are_autograds(size: int, num_classes: int, masked: bool, seed: int) -> None:
    rng = generator(seed, "test")
    features = torch.randn(size, 5, generator=rng, dtype=torch.float64)
    weight = torch.randn(num_classes, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    mask = 2 * torch.rand(size, num_classes, generator=rng, dtype=torch.float64) if masked else None
    num_open = int(torch.randint(1, num_classes + 1, (), generator=rng))
    targets = torch.randint(num_open, (size,), generator=rng)
    logits = masked_logits(features @ weight.T, mask, torch.arange(num_classes) < num_open)
    losses = F.cross_entropy(logits, targets, reduction="none")
    own, batch = own_gradients(features, logits.detach(), mask, targets)
    (mean,) = torch.autograd.grad(losses.mean(), weight, retain_graph=True)
    assert torch.allclose(batch, mean[targets], atol=1e-12)
    for index in range(size):
        (single,) = torch.autograd.grad(losses[index], weight, retain_graph=True)
        assert torch.allclose(own[index], single[targets[index]], atol=1e-12)


@pytest.mark.parametrize("copies", [1, 4])
def test_one_sample_or_equal_ones_are_not_ignored(copies: int) -> None:
    features, weight, bias, mask, targets, open_classes = vector_parts()
    features, mask, targets = (part[1:2].repeat_interleave(copies, 0) for part in (features, mask, targets))
    logits = masked_logits(F.linear(features, weight, bias), mask, open_classes)
    assert ignore_scores(features, logits, mask, targets).max() < 1e-6


@given(st.lists(st.floats(0, 2), min_size=1, max_size=8), st.floats(0, 1))
@settings(deadline=None)
def test_without_power_or_share_it_is_cross_entropy(scores: list[float], alpha: float) -> None:
    ignored = torch.tensor(scores)
    losses = torch.linspace(0.1, 2, len(scores))
    for form in ("released", "intended"):
        assert torch.allclose(focal_loss(losses, ignored, alpha, 0.0, form), losses.mean())
        assert torch.allclose(focal_loss(losses, ignored, 0.0, 2.0, form), losses.mean())


def test_the_mask_comes_before_infinity() -> None:
    logits = masked_logits(torch.tensor([[2.0, -3.0, 1.0]]), torch.full((1, 3), 0.5), torch.tensor([True, True, False]))
    assert logits.tolist() == [[1.0, -1.5, -torch.inf]]


def test_features_are_scaled_within_bounds_and_without_gradient() -> None:
    features = torch.randn(40, 6, requires_grad=True)
    weight = torch.randn(3, 6, requires_grad=True)
    divisor = feature_divisor(features, weight, torch.randint(3, (40,)), 0.5)
    assert not divisor.requires_grad
    assert divisor.min() >= 0.5
    assert divisor.max() <= 2.5


def test_only_what_was_picked_gets_a_gradient() -> None:
    method = learner().method
    images, targets = torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 0, 1])
    features, choice = method.encode(images)
    picked = torch.zeros_like(choice.picked)  # all take prompt 0
    features = prompted(method._net, embed(method._net, images), method.pool.general, method.pool.expert[picked])
    method.classifier_loss(features, picked, targets, ALL).backward()
    pool = method.pool
    assert pool.expert.grad[0].abs().max() > 0
    assert pool.expert.grad[1:].abs().max() == 0
    assert pool.mask.grad[0].abs().max() > 0
    assert pool.mask.grad[1:].abs().max() == 0
    assert pool.keys.grad is None, "the cross entropy reaches the keys"
    assert pool.general.grad.abs().max() > 0
    assert all(p.grad is None for p in method.backbone.parameters()), "the transformer is not frozen"
    method.prompt_loss(choice).backward()
    assert pool.keys.grad.abs().max() > 0


def test_features_are_not_scaled_at_test() -> None:
    method = learner().method
    images = torch.rand(5, 1, 6, 6)
    with torch.no_grad():
        features, choice = method.encode(images)
        plain = method.classifier(features) * method.pool.masks(choice.picked)
        assert torch.allclose(method.logits(images, ALL, None), plain)


def test_the_mask_starts_at_twice_the_sigmoid_of_minus_one() -> None:
    method = learner().method
    assert torch.allclose(method.pool.masks(torch.tensor([0, 2])), torch.full((2, 6), 0.5378828))


def test_counts_change_in_training_only_and_once_per_step() -> None:
    """One count per image and inner step; evaluation after every step (the default of `tiny`) adds nothing."""
    made = learner()
    made.stream.updates = 3
    run(made)
    assert int(made.method.pool.counts.sum()) == 3 * made.scenario.offsets[-1]


def test_evaluation_uses_the_counts() -> None:
    method = learner().method
    images = torch.rand(6, 1, 6, 6)
    with torch.no_grad():
        _, fresh = method.encode(images)
        rare = int(fresh.picked[0] + 1) % SMALL["prompts"]
        method.pool.counts[:] = 1000
        method.pool.counts[rare] = 0
        method.logits(images, ALL, None)
        _, used = method.encode(images)
        assert set(used.picked.tolist()) == {rare}
    assert torch.equal(fresh.distance, used.distance)
    assert int(method.pool.counts.sum()) == 1000 * (SMALL["prompts"] - 1), "an evaluation has been counted"


# -- the transformer -------------------------------------------------------------------------------------------------
def test_without_prompts_it_is_the_backbone() -> None:
    net = transformer().eval()
    images = torch.rand(3, 1, 6, 6)
    none, nothing = torch.zeros(2, 0, 8), torch.zeros(3, 3, 0, 8)
    assert torch.allclose(prompted(net, embed(net, images), none, nothing), net(images), atol=1e-6)


def test_prompts_are_appended_and_cut_off() -> None:
    """Block inputs grow by the prompt where there is one, and every block gives back the class token and 4 patches."""
    net, lengths = transformer().eval(), []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    prompted(net, embed(net, torch.rand(2, 1, 6, 6)), torch.rand(2, 5, 8), torch.rand(2, 3, 20, 8))
    assert lengths == [10, 10, 25, 25, 25, 5]


def test_the_query_leaves_out_the_last_block() -> None:
    net = transformer().eval()
    tokens = embed(net, torch.rand(2, 1, 6, 6))
    short, whole = query_of(net, tokens, False), query_of(net, tokens, True)
    through = tokens
    for block in net.blocks[:-1]:
        through = block(through)
    assert torch.equal(short, through[:, 0])
    assert torch.equal(whole, net.blocks[-1](through)[:, 0])


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        (Flat, "Flat is not one of timm's vision transformers"),
        (partial(transformer, depth=4), "has 4 blocks"),
        (lambda: no_class_token(), "has no class token"),
    ],
)
def test_other_backbones_are_refused(backbone, words: str) -> None:
    with pytest.raises(InputError, match=words):
        learner_for(split_scenario(make_store()), MVP, backbone=backbone, config=MVP.Config(**SMALL))


def no_class_token() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    net = VisionTransformer(
        img_size=6, patch_size=3, in_chans=1, num_classes=0, embed_dim=8, depth=5, num_heads=2, class_token=False,
        global_pool="avg",
    )  # fmt: skip
    net.num_features = 8
    return net


# -- the method ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"capacity": 6, "replay_batch_size": 3, "focal": "intended"},
        {"prompt_loss": "distance", "use_mask": False, "use_scaling": False, "use_focal": False},
    ],
)
def test_survives_a_kill(changes: dict) -> None:
    whole = assert_survives_kill(
        partial(
            learner_for, split_scenario(make_store(), online=True), MVP, backbone=transformer,
            config=MVP.Config(**SMALL, **changes),
        ),
        at_most=3,
    )  # fmt: skip
    assert len(whole.method.buffer) == changes.get("capacity", 0)
    assert "backbone" not in whole.method.state_dict()


def test_the_update_may_be_captured() -> None:
    """Its parts from inputs that stay where they are, as a CUDA graph has them, give the same run."""
    check_graphable(MVP, "it")
    plain, captured = learner(capacity=6, replay_batch_size=3), learner(capacity=6, replay_batch_size=3)
    captured.cuda_graph = True
    assert equal(outcome(run(plain)), outcome(run(captured)))


def test_replay_adds_exemplars_to_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made, sizes = learner(capacity=6, replay_batch_size=3), []
    loss = MVP.classifier_loss

    def watched(self: MVP, features: Tensor, *rest: Tensor) -> Tensor:
        sizes.append(len(features))
        return loss(self, features, *rest)

    monkeypatch.setattr(MVP, "classifier_loss", watched)
    run(made)
    assert sizes == [5, 8, 8, 8, 7, *[8, 8, 8, 8, 7] * 2]
    assert made.method.memory_bytes()["buffer"] > 0


def test_a_batch_of_one() -> None:
    scenario = split_scenario(make_store(), online=True)
    made = learner(scenario)
    made.stream.batch_size = 1
    run(made)
    assert torch.isfinite(made.method.classifier.weight).all()


def test_without_contrast_usage_does_not_count() -> None:
    method = learner(prompt_loss="distance").method
    method.pool.counts[:] = torch.tensor([900, 5, 0])
    with torch.no_grad():
        _, choice = method.encode(torch.rand(5, 1, 6, 6))
    assert torch.equal(choice.picked, choice.distance.argmin(1))
    assert torch.equal(method.prompt_loss(choice), choice.own.mean())
