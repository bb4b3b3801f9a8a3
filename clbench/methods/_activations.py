"""A memory of hidden activations with 8 bits each, on the device (card `sharp`, sections 2 and 8).

Shapes: n classes in memory, K activations per class, R replayed; an activation is (C, H, W).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["ActivationMemory", "dequantise", "draw_replay", "quantise", "replay_counts"]


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """One class's activations (k, C, H, W) -> uint8 codes `255 (v - min) / (max - min)`, rounded half to even, and the
    (2,) least and greatest value. Equal values all get code 0."""
    low, high = values.amin(), values.amax()
    width = torch.where(high > low, high - low, torch.ones_like(low))
    return ((values - low) / width * 255).round().to(torch.uint8), torch.stack([low, high])


def dequantise(codes: Tensor, ranges: Tensor) -> Tensor:
    """(R, C, H, W) uint8 codes and their (R, 2) least and greatest values -> (R, C, H, W) float32."""
    low, high = ranges.view(-1, 2, *[1] * (codes.ndim - 1)).unbind(1)
    return codes.to(ranges.dtype) / 255 * (high - low) + low


def replay_counts(num: int, num_classes: int) -> list[int]:
    """How many of `num` replayed activations each class gives: equal shares, the first classes one more."""
    share, rest = divmod(num, num_classes)
    return [share + (index < rest) for index in range(num_classes)]


def draw_replay(available: Tensor, size: int, num: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which activations to replay: class positions (num,) and places (num,) int64.

    available: (n,) int64 activations of each class, at most `size`. A class that has enough of them gives none twice;
    from any other they are drawn with replacement. Reads nothing on the host.
    """
    counts, device = replay_counts(num, len(available)), available.device
    which = torch.tensor([c for c, count in enumerate(counts) for _ in range(count)], device=device)
    rank = torch.tensor([i for count in counts for i in range(count)], device=device)
    keys = torch.rand((len(available), size), generator=rng, device=device)
    repeated = (torch.rand(num, generator=rng, device=device) * available[which]).long()
    empty = torch.arange(size, device=device) >= available[:, None]
    once = keys.masked_fill(empty, 2.0).argsort(1)[which, rank.clamp(max=size - 1)]
    enough = torch.tensor(counts, device=device) <= available
    return which, torch.where(enough[which], once, repeated)


class ActivationMemory:
    """Up to `size` activations of each class, with the episode they are from; a class has one entry, its newest."""

    def __init__(self, size: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.size = size
        self.device = device
        self.codes = torch.zeros((0, size, *shape), dtype=torch.uint8, device=device)
        self.ranges = torch.zeros((0, 2), device=device)
        self.available = torch.zeros(0, dtype=torch.int64, device=device)
        self.labels = torch.zeros(0, dtype=torch.int64, device=device)
        self.episodes = torch.zeros(0, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.codes)

    def store(self, label: int, episode: int, activations: Tensor) -> None:
        """Keep the first `size` of (k, C, H, W) float activations of a class, as its only ones."""
        self._keep(self.labels != label)
        codes, limits = quantise(activations[: self.size])
        padded = codes.new_zeros((1, *self.codes.shape[1:]))
        padded[0, : len(codes)] = codes
        numbers = torch.tensor([[len(codes)], [label], [episode]], device=self.device)
        self.codes = torch.cat([self.codes, padded])
        self.ranges = torch.cat([self.ranges, limits[None]])
        self.available = torch.cat([self.available, numbers[0]])
        self.labels = torch.cat([self.labels, numbers[1]])
        self.episodes = torch.cat([self.episodes, numbers[2]])

    def draw(self, num: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """`num` activations (num, C, H, W) float32 and their classes (num,) int64; reads nothing on the host."""
        which, place = draw_replay(self.available, self.size, num, rng)
        return dequantise(self.codes[which, place], self.ranges[which]), self.labels[which]

    def of_class(self, label: int) -> Tensor:
        """All activations (k, C, H, W) float32 of a class."""
        index = int((self.labels == label).nonzero()[0, 0])
        codes = self.codes[index, : int(self.available[index])]
        return dequantise(codes, self.ranges[index].expand(len(codes), 2))

    def keep(self, episodes: Sequence[int]) -> None:
        """Forget what is from any other episode."""
        self._keep(torch.isin(self.episodes, torch.tensor(episodes, dtype=torch.int64, device=self.device)))

    def num_bytes(self) -> int:
        """Codes and ranges, room for `size` activations of each class included."""
        return self.codes.nbytes + self.ranges.nbytes

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("codes", "ranges", "available", "labels", "episodes")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(self.device))

    def _keep(self, classes: Tensor) -> None:
        self.load_state_dict({name: value[classes] for name, value in self.state_dict().items()})
