"""ASER: experience replay that picks and keeps exemplars by their Shapley value for a nearest-neighbour classifier.

Idea: an exemplar is worth replaying if it helps to tell its own memory apart (cooperative) and stands against the
incoming batch (adversarial); one is worth keeping if it helps a class-balanced sample of the memory.

Paper: Shim et al., AAAI 2021 (arXiv 2009.00093). Official code: RaptorMai/online-continual-learning (card
`online_baselines`, section 2.7). Until the memory is full: random draws, arrivals fill free slots. Then

    draw      candidates: `per_class` exemplars of each class. Score: mean value for another such sample without the
              candidates, minus mean value for the stream batch (`asvm`). The `replay_batch_size` best are replayed.
    train     cross entropy over [replay; stream] in one forward pass, one step
    update    evaluation: `per_class` exemplars of each class, and stream samples of classes whose share of the memory
              is below U(0, 1/C). Candidates: per_class * C other exemplars, drawn evenly, and the stream batch. The
              best of them fill the exemplars' places: arrivals among them take the slots of those that are not.

Values are over features in eval mode. Different from the official code: its two forward passes whose gradients it
throws away are left out, and with them their effect on batch norm's running statistics; draws have a fixed size, so
where fewer candidates than a replay batch exist, the best are repeated.

Shapes: E evaluation points, N candidates, D features, M exemplars, B stream batch, C classes.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clbench.memory.buffer import Buffer, Exemplars
from clbench.methods._softmax import SgdConfig, SoftmaxMethod
from clbench.methods.base import Setting, hp
from clbench.stream.types import Batch

__all__ = ["ASER", "METHOD", "ASERConfig", "balanced_slots", "knn_shapley", "swaps"]


@dataclass(frozen=True)
class ASERConfig(SgdConfig):
    capacity: int = hp(1000, "exemplars in memory", low=1, high=10_000_000, unit="exemplars")
    replay_batch_size: int = hp(10, "exemplars replayed per step", low=1, high=100_000, source="card, family A")
    neighbours: int = hp(3, "K of the nearest-neighbour classifier", low=1, high=10_000, source="card 2.7")
    per_class: int = hp(
        2, "exemplars of each class in a balanced draw", low=1, high=10_000,
        source="card 2.7: 9 (CIFAR-10), 2 (CIFAR-100), 3 (Mini-ImageNet)",
    )  # fmt: skip
    score: str = hp(
        "asvm", "asvm: mean cooperative minus mean adversarial value; asv: largest minus smallest; neg_sv: adversarial "
        "value alone", choices=("asvm", "asv", "neg_sv"), source="card 2.7",
    )  # fmt: skip
    update_rule: str = hp(
        "aser", "how a full memory takes arrivals: by value, or as a reservoir", choices=("aser", "reservoir"),
        source="card 2.7",
    )  # fmt: skip


def knn_shapley(
    points: Tensor,
    point_targets: Tensor,
    candidates: Tensor,
    candidate_targets: Tensor,
    k: int,
    valid: Tensor | None = None,
) -> Tensor:
    """(E, N) Shapley values of candidates for the K-nearest-neighbour answer to each point; 0 for invalid candidates.

    points: (E, D), candidates: (N, D), targets int64, valid: (N,) bool or None for all. With the n valid ones by
    Euclidean distance from a point: s_n = [right_n] / n, s_i = s_(i+1) + ([right_i] - [right_(i+1)]) min(K, i) / (K i).
    """
    if valid is None:
        valid = torch.ones_like(candidate_targets, dtype=torch.bool)
    distance = torch.cdist(points, candidates).masked_fill(~valid, torch.inf)
    order = distance.argsort(dim=1, stable=True)
    right = ((candidate_targets[order] == point_targets[:, None]) & valid[order]).to(points.dtype)
    place = torch.arange(1, len(candidates) + 1, device=points.device, dtype=points.dtype)
    number = valid.sum()
    factor = torch.where(place == number, 1 / place, place.clamp(max=k) / (k * place))
    following = torch.cat([right[:, 1:], torch.zeros_like(right[:, :1])], dim=1)
    values = ((right - following) * factor).flip(1).cumsum(1).flip(1)
    return torch.zeros_like(values).scatter_(1, order, values)


def balanced_slots(
    targets: Tensor, classes: Tensor, per_class: int, uniform: Tensor, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`per_class` random exemplars of each class: slots (K * per_class,) int64 and whether each exists, bool.

    targets: (M,) int64 of the memory; classes: (K,) int64 in rising order, all that are in the memory and others;
    uniform: (M,) in [0, 1), who comes first; excluded: (M,) bool or None.
    """
    labels = targets if excluded is None else targets.masked_fill(excluded, torch.iinfo(targets.dtype).max)
    shuffled = uniform.argsort()
    order = shuffled[labels[shuffled].argsort(stable=True)]  # by class, at random inside
    counts = (labels == classes[:, None]).sum(dim=1)
    rank = torch.arange(per_class, device=labels.device)
    place = (counts.cumsum(0) - counts)[:, None] + rank
    return order[place.clamp(max=len(order) - 1).flatten()], (rank < counts[:, None]).flatten()


def swaps(value: Tensor, valid: Tensor, slots: Tensor, capacity: int) -> Tensor:
    """Slot that each of B arrivals takes, `capacity` for none: (B,) int64.

    value: (N,) of N - B exemplars and then the arrivals; valid: (N - B,) bool, which exemplars exist; slots: (N - B,)
    where they lie. With n valid exemplars the n largest values stay: the arrivals among them, in order of value, take
    the places of the exemplars that are not, in the same order.
    """
    held = len(slots)
    new = len(value) - held
    order = value.masked_fill(torch.cat([~valid, torch.zeros_like(valid[:1]).expand(new)]), -torch.inf)
    order = order.argsort(descending=True, stable=True)
    place = torch.arange(len(value), device=value.device)
    stays, arrived, number = place < valid.sum(), order >= held, valid.sum()
    enters, leaves = stays & arrived, ~stays & ~arrived & (place < number + new)
    left = torch.full((new + 1,), capacity, device=value.device)
    item = order.clamp(max=max(held - 1, 0))
    left.scatter_(0, torch.where(leaves, leaves.cumsum(0) - 1, new), torch.where(leaves, slots[item], capacity))
    taken = torch.where(enters, left[(enters.cumsum(0) - 1).clamp(min=0)], capacity)
    return torch.empty_like(taken).scatter_(0, order, taken)[held:]


class SwapBuffer(Buffer):
    """A buffer whose entries can be replaced at given slots."""

    def swap(self, slots: Tensor, rows: Tensor, targets: Tensor, domain: Tensor | None) -> None:
        """Put arrivals (B,) into different slots (B,); `capacity` drops one."""
        arrived = [rows, targets]
        if domain is not None:
            self.has_domain = True
            arrived.append(domain)
        self._index[: len(arrived)].index_copy_(1, slots, torch.stack(arrived))
        self.num_seen += len(rows)


class ASER(SoftmaxMethod):
    """See the module."""

    Config = ASERConfig
    graphable = True
    quick: ClassVar[Mapping[str, Any]] = {"capacity": 20}
    config: ASERConfig

    def __init__(self, config: ASERConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self.buffer = SwapBuffer(config.capacity, setting.device)
        # classes that may be in memory during each task, known without a look at it: nothing is encoded for others
        self._classes = [
            torch.cat(list(setting.task_classes[: task + 1])).unique().to(setting.device)
            for task in range(len(setting.task_classes))
        ]

    # -- what is replayed --------------------------------------------------------------------------------------------
    def draw(self, batch: Batch) -> Batch:
        """The replay batch ahead of the stream batch."""
        if len(self.buffer) == 0:
            return batch
        step, rng = batch.at.step, self.setting.rng
        if self.buffer.num_seen <= self.config.capacity:
            held = self.buffer.sample(self.config.replay_batch_size, rng("replay", step))
        else:
            held = self.buffer.take(self._best(batch))
        images = self.setting.read(held.rows, held.domain, batch.phase.view, rng("replay-view", step))
        return batch._replace(
            images=torch.cat([images, batch.images]), targets=torch.cat([held.targets, batch.targets])
        )

    @torch.no_grad()
    def _best(self, batch: Batch) -> Tensor:
        """(replay_batch_size,) slots of the candidates with the highest score."""
        config, buffer, classes = self.config, self.buffer, self._classes[batch.at.task]
        uniform = torch.rand((2, len(buffer)), generator=self.setting.rng("balanced", batch.at.step),
                             device=self.setting.device)  # fmt: skip
        slots, valid = balanced_slots(buffer.targets, classes, config.per_class, uniform[0])
        used = torch.zeros(len(buffer), device=slots.device).index_add_(0, slots, valid.float()) > 0
        others, there = balanced_slots(buffer.targets, classes, config.per_class, uniform[1], used)
        candidates, partners = buffer.take(slots), buffer.take(others)
        features = self._encode(candidates, partners, batch)
        mine, theirs, stream = features.split([len(slots), len(others), len(batch.rows)])
        against = knn_shapley(stream, batch.targets, mine, candidates.targets, config.neighbours, valid)
        if config.score == "neg_sv":
            score = -against.sum(dim=0)
        else:
            along = knn_shapley(theirs, partners.targets, mine, candidates.targets, config.neighbours, valid)
            if config.score == "asv":
                score = along.masked_fill(~there[:, None], -torch.inf).amax(dim=0) - against.amin(dim=0)
            else:
                mean = (along * there[:, None]).sum(dim=0) / there.sum().clamp(min=1)
                score = mean - against.mean(dim=0)
        order = score.masked_fill(~valid, -torch.inf).argsort(descending=True, stable=True)
        place = torch.arange(config.replay_batch_size, device=slots.device) % valid.sum()
        return slots[order[place]]

    # -- what is kept ------------------------------------------------------------------------------------------------
    def keep(self, batch: Batch) -> None:
        if not batch.last_update or batch.epoch > 0:
            return
        rng = self.setting.rng("reservoir", batch.at.step)
        room = self.config.capacity - self.buffer.num_seen
        if self.config.update_rule == "reservoir" or room >= len(batch.rows):
            self.buffer.add(batch.rows, batch.targets, rng, batch.domain)
            return
        room = max(room, 0)
        domain = batch.domain
        if room > 0:
            first = None if domain is None else domain[:room]
            self.buffer.add(batch.rows[:room], batch.targets[:room], rng, first)
        rest = batch._replace(
            rows=batch.rows[room:], targets=batch.targets[room:], domain=None if domain is None else domain[room:]
        )
        self.buffer.swap(self._places(rest), rest.rows, rest.targets, rest.domain)

    @torch.no_grad()
    def _places(self, batch: Batch) -> Tensor:
        """Slots that the arrivals take in a full memory, `capacity` for those not kept."""
        config, buffer, num_classes = self.config, self.buffer, self.setting.num_classes
        uniform = torch.rand((2, len(buffer) + 1), generator=self.setting.rng("swap", batch.at.step),
                             device=self.setting.device)  # fmt: skip
        classes = self._classes[batch.at.task]
        slots, valid = balanced_slots(buffer.targets, classes, config.per_class, uniform[0, 1:])
        used = torch.zeros(len(buffer), device=slots.device).index_add_(0, slots, valid.float()) > 0
        share = (buffer.targets == batch.targets[:, None]).float().mean(dim=1)
        minority = share < uniform[0, 0] / num_classes
        drawn = uniform[1, 1:].masked_fill(used, 2.0).argsort()[: config.per_class * num_classes]
        points, candidates = buffer.take(slots), buffer.take(drawn)
        features = self._encode(points, candidates, batch)
        mine, theirs, stream = features.split([len(slots), len(drawn), len(batch.rows)])
        there = torch.cat([~used[drawn], torch.ones_like(minority)])
        value = knn_shapley(
            torch.cat([mine, stream]), torch.cat([points.targets, batch.targets]),
            torch.cat([theirs, stream]), torch.cat([candidates.targets, batch.targets]), config.neighbours, there,
        )  # fmt: skip
        counted = torch.cat([valid, minority])
        return swaps((value * counted[:, None]).sum(dim=0), ~used[drawn], drawn, config.capacity)

    # -- inside ------------------------------------------------------------------------------------------------------
    def _encode(self, first: Exemplars, second: Exemplars, batch: Batch) -> Tensor:
        """Features, in eval mode, of two draws and the stream batch, one behind the other."""
        rows = torch.cat([first.rows, second.rows, batch.rows])
        domain = None
        if first.domain is not None and second.domain is not None and batch.domain is not None:
            domain = torch.cat([first.domain, second.domain, batch.domain])
        view = "features" if self.frozen_backbone else "raw"
        with resting(self.backbone):
            return self.features(self.setting.read(rows, domain, view), None).float()

    def memory_bytes(self) -> dict[str, int]:
        return {"buffer": self.buffer.num_bytes(self.setting.image_bytes)}


@contextlib.contextmanager
def resting(network: nn.Module) -> Iterator[None]:
    """Eval mode for all modules; every module's own mode is put back."""
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


METHOD = ASER
