"""The floor: the same maths as ER in bare PyTorch, float tensors in memory, nothing else.

What a ratio is measured against must be fair: the floor draws its replay batch and updates its reservoir as vectorised
tensor code, as a careful person would in a notebook.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FloorER:
    """ER on normalised float images in memory: index, two forward passes, one SGD step, reservoir."""

    def __init__(
        self, images: Tensor, labels: Tensor, model: nn.Module, *, lr: float, capacity: int, batch: int
    ) -> None:
        self.images, self.labels, self.model, self.batch = images, labels, model, batch
        self.capacity = capacity
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        self.memory_x = torch.zeros((capacity, *images.shape[1:]), device=images.device)
        self.memory_y = torch.zeros(capacity, dtype=torch.int64, device=images.device)
        self.seen = 0

    def draw(self, start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Stream batch and replay batch, then the reservoir takes the stream batch."""
        x, y = self.images[start : start + self.batch], self.labels[start : start + self.batch]
        filled = min(self.seen, self.capacity)
        slots = torch.randperm(filled, device=x.device)[: self.batch]
        replay_x, replay_y = self.memory_x[slots], self.memory_y[slots]
        place = max(min(self.capacity - self.seen, len(x)), 0)
        if place:
            self.memory_x[self.seen : self.seen + place] = x[:place]
            self.memory_y[self.seen : self.seen + place] = y[:place]
        if place < len(x):
            to = (torch.rand(len(x) - place, device=x.device) * (self.seen + place)).long()
            keep = to < self.capacity
            self.memory_x[to[keep]] = x[place:][keep]
            self.memory_y[to[keep]] = y[place:][keep]
        self.seen += len(x)
        return x, y, replay_x, replay_y

    def step(self, start: int) -> None:
        x, y, replay_x, replay_y = self.draw(start)
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        if len(replay_x):
            F.cross_entropy(self.model(replay_x), replay_y).backward()
        self.optimizer.step()


@torch.no_grad()
def floor_evaluate(model: nn.Module, images: Tensor, labels: Tensor, group: Tensor, hits: Tensor, chunk: int) -> None:
    """One evaluation: forward in chunks, right answers added per group, no host read."""
    model.eval()
    for start in range(0, len(images), chunk):
        cut = slice(start, start + chunk)
        right = model(images[cut]).argmax(1) == labels[cut]
        hits.index_add_(0, group[cut], right.long())
    model.train()
