"""How many images go through a network in one forward pass, where nobody needs gradients."""

import math
from collections.abc import Sequence

import torch

__all__ = ["rows_per_pass"]

MOST = 512
ON_CPU = 64  # of 32 px images in three colours
FEWEST = 16


def rows_per_pass(image_shape: Sequence[int], device: torch.device) -> int:
    """Rows of one pass of (C, H, W) images.

    On a CPU activations fall out of the cache: the reduced ResNet-18 at 32 px is slower in passes of 512 than of 64,
    mobilenetv2_100 at 128 px in 256 than in 16 (`python benchmarks/passes.py`). Not used by `FeatureBank`, whose
    numbers on disk are bound to its own choice.
    """
    if device.type != "cpu":
        return MOST
    return min(MOST, max(FEWEST, ON_CPU * 3 * 32 * 32 // math.prod(image_shape)))
