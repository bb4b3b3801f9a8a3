"""What methods with cosine proxies share: unit vectors, cosine scores, class counts of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["class_counts", "cosine_scores", "unit"]


def unit(vectors: Tensor, eps: float = 1e-6) -> Tensor:
    """(B, D) -> v / (|v| + eps) of each row; 0 stays 0 and has a finite gradient. Source: hpcr card, section 2."""
    length: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / (length + eps)


def cosine_scores(features: Tensor, proxies: Tensor, temperature: float) -> Tensor:
    """(B, D) features, (C, D) proxies -> (B, C) cosines over the temperature."""
    return unit(features) @ unit(proxies).T / temperature


def class_counts(targets: Tensor, num_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(C,): how many of the (B,) int64 targets each class has."""
    counts = torch.zeros(num_classes, dtype=dtype, device=targets.device)
    return counts.index_add_(0, targets, torch.ones_like(targets, dtype=dtype))
