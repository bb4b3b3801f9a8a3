"""Heads: values, fresh rows, and the fields that evaluators fuse."""

import math

import pytest
import torch

from clbench.backbones import CosineHead, LinearHead
from clbench.methods.base import Head
from clbench.rng import generator


def test_linear_head() -> None:
    head = LinearHead(5, 4)
    features = torch.rand(3, 5)
    assert torch.equal(head(features), torch.zeros(3, 4))
    head.reset(torch.arange(4), generator(0, "head"), std=None)
    torch.testing.assert_close(head(features), features @ head.weight.t() + head.bias)
    fused = Head(*head.as_head())
    assert (fused.kind, fused.scale) == ("linear", 1.0)
    assert fused.weight is head.weight
    assert fused.bias is head.bias
    assert LinearHead(5, 4, bias=False).as_head()[2] is None


@pytest.mark.parametrize("kind", [LinearHead, CosineHead])
def test_reset_draws_some_rows_from_the_generator_alone(kind: type[LinearHead | CosineHead]) -> None:
    state = torch.get_rng_state()
    head, again = kind(400, 6), kind(400, 6)
    for each in (head, again):
        each.reset(torch.arange(6), generator(1, "all"))
    kept = head.weight.detach().clone()
    rows = torch.tensor([4, 1])
    head.reset(rows, generator(2, "some"))
    again.reset(rows, generator(2, "some"))
    assert torch.equal(head.weight, again.weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(head.weight[[0, 2, 3, 5]], kept[[0, 2, 3, 5]])
    assert not torch.equal(head.weight[rows], kept[rows])
    assert float(head.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert head.weight.is_leaf
    assert head.weight.requires_grad


def test_default_initialisation_of_linear_layers() -> None:
    head = LinearHead(100, 50)
    head.reset(torch.arange(50), generator(0, "x"), std=None)
    for values in (head.weight, head.bias):
        assert values is not None
        assert 0.09 < float(values.detach().abs().max()) <= 1 / math.sqrt(100)
    assert float(head.weight.detach().std()) == pytest.approx(0.1 / math.sqrt(3), rel=0.05)


def test_cosine_head() -> None:
    head = CosineHead(7, 3)
    head.reset(torch.arange(3), generator(0, "x"))
    features = torch.randn(4, 7, generator=generator(0, "f"))
    logits = head(features)
    for b in range(4):
        for c in range(3):
            f, w = features[b].double(), head.weight[c].detach().double()
            expected = 10 * float(f @ w) / ((float(f.norm()) + 1e-5) * (float(w.norm()) + 1e-5))
            assert logits[b, c].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(head(features * 50), logits, rtol=1e-4, atol=1e-4)
    fused = Head(*head.as_head())
    assert (fused.kind, fused.bias, fused.scale) == ("cosine", None, 10.0)


def test_cosine_head_is_finite_at_zero() -> None:
    head = CosineHead(7, 3)
    features = torch.zeros(2, 7, requires_grad=True)
    head(features).sum().backward()
    assert torch.isfinite(head.weight.grad).all()
    assert torch.isfinite(features.grad).all()
