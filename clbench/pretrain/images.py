"""Training images of clip-small: uint8 rows of the stores, drawn by domain and changed as a batch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["augment", "batch_sizes", "recolour"]


def batch_sizes(shares: list[float], batch: int) -> list[int]:
    """Whole numbers that add up to `batch`, as near to the shares as can be (largest remainders)."""
    exact = [share / sum(shares) * batch for share in shares]
    sizes = [math.floor(x) for x in exact]
    for index in sorted(range(len(exact)), key=lambda i: sizes[i] - exact[i])[: batch - sum(sizes)]:
        sizes[index] += 1
    return sizes


def recolour(grey: Tensor, rng: torch.Generator) -> Tensor:
    """(B, 1, H, W) in [0, 1] -> (B, 3, H, W): a third of them between two random colours that are unlike in brightness,
    the others as they are or, one in four, inverted."""
    batch = len(grey)
    u = torch.rand((batch, 8), generator=rng)
    dark, light = u[:, 0:3] * 0.6, 1 - u[:, 3:6] * 0.6
    swap = (u[:, 6] < 0.25)[:, None]
    low, high = torch.where(swap, light, dark), torch.where(swap, dark, light)
    plain = (u[:, 7] < 2 / 3)[:, None]
    low = torch.where(plain, swap.float(), low)
    high = torch.where(plain, 1 - swap.float(), high)
    return low[:, :, None, None] + (high - low)[:, :, None, None] * grey


def augment(images: Tensor, mirror: Tensor, rng: torch.Generator) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> the same shape: a random window of 50 to 110 % of the area, turned by up to 10 degrees,
    mirrored in half of the rows that `mirror` (B,) allows; brightness, contrast and colour changed; one in ten blurred.
    """
    batch = len(images)
    u = torch.rand((batch, 12), generator=rng)
    side = (0.5 + 0.6 * u[:, 0]).sqrt()
    stretch = torch.exp((u[:, 1] - 0.5) * 0.4)
    angle = (u[:, 2] - 0.5) * (math.pi / 9)
    wide, high = side * stretch, side / stretch
    flip = torch.where(mirror & (u[:, 3] < 0.5), -1.0, 1.0)
    theta = torch.stack(
        [
            torch.stack([flip * wide * angle.cos(), -high * angle.sin(), (2 * u[:, 4] - 1) * (1 - wide).abs()], 1),
            torch.stack([flip * wide * angle.sin(), high * angle.cos(), (2 * u[:, 5] - 1) * (1 - high).abs()], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    out = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    blurred = F.avg_pool2d(out, 3, 1, 1, count_include_pad=False)
    column = (slice(None), None, None, None)
    out = torch.where((u[:, 6] < 0.1)[column], blurred, out)
    grey = out.mean(1, keepdim=True)
    colour = torch.where(u[:, 7] < 0.1, 0.0, 0.6 + 0.8 * u[:, 8])
    out = grey + (out - grey) * colour[column]
    level = out.mean((1, 2, 3), keepdim=True)
    out = level + (out - level) * (0.6 + 0.8 * u[:, 9])[column] + (0.4 * u[:, 10] - 0.2)[column]
    return out.clamp_(0, 1)
