"""PL-FMS: samples of new classes wait for their class to settle; pseudo-labels tell which exemplars may be given up.

Lee et al., ICCV 2023 (hierarchical label expansion), in the form of the `hle` card, sections 1 and 5.

Flexible memory sampling (FMS): a stream sample is used with a probability that grows linearly from 0, as its class
appears, to 1; the rest of the batch is filled from the memory. The memory is CLIB's (`clib`), and so are the
importance of exemplars and the learning rate. Each sample counts in the head of its own label level.

Pseudo-labels (PL): the released code has none (card 5.1) and the paper's equations were not read. Implemented is what
figure 3 of the official repository and its caption show: *memory management*. Exemplars of a class are given labels at
the levels they have none of, by the current classifier among the opened classes that the tree allows, that is, the
ancestors and descendants of their own label. For the largest class the most frequent such label per level joins in: all
exemplars of these classes compete, and the least important one goes, whether it came by a true or by a pseudo-label.
`variant=released` leaves this out: the largest class alone loses.

Differences from the official code:
- The head has all classes from the start (`head_growth=keep`: rows of old classes, biases included, stay as they are
  when a class appears). The official code draws all biases of a level anew with each class (`bias`); in its multi-depth
  PL-FMS the whole head of that level (`reset`, card 5.4). Heads are redrawn once per stream batch that brings a class.
- The stream's length Z is the scenario's own, where the code has tables of numbers.
- CutMix draws one box per batch where the code draws one per level.
- If the memory is smaller than what is to be filled up, the batch is smaller (as there), but batch norm still sees the
  stream samples left out.
- The ragged last batch of a task is trained on; the code leaves it for the next task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clbench.memory.importance import NEVER
from clbench.methods._importance_replay import ImportanceConfig, ImportanceReplay, Prepared
from clbench.methods.base import Setting, hp
from clbench.stream.types import Batch


@dataclass(frozen=True)
class PLFMSConfig(ImportanceConfig):
    """Hyperparameters of PL-FMS."""

    importance_every: int = hp(
        5, "updates between two refreshes of importance (a forward pass over the memory each)", low=1, high=1_000_000,
        unit="updates", source="hle card 7: 5 in single depth",
    )  # fmt: skip
    replay_batch_size: int = hp(
        8, "exemplars per update besides those in place of stream samples", low=0, high=100_000, unit="exemplars",
        source="hle card, section 2: half of the batch of 16",
    )  # fmt: skip
    variant: str = hp(
        "paper", "paper: pseudo-labels widen who may be given up; released: the code, which has none",
        choices=("paper", "released"), source="hle card 5.1",
    )  # fmt: skip
    ramp: float = hp(
        1.0, "a class is used in full after ramp * stream length / seen classes samples; 2 in multi-depth",
        low=1e-9, high=1e9, source="hle card 1, FMS 2",
    )  # fmt: skip
    stream_length: int = hp(0, "Z, samples of the whole stream; 0: the scenario's own", low=0, high=10**12)
    head_growth: str = hp(
        "keep", "as a class appears, its level's head is left alone (keep), or its biases (bias) or all of it (reset) "
        "are drawn anew", choices=("keep", "bias", "reset"), source="hle card 5.4",
    )  # fmt: skip


# -- the rules -------------------------------------------------------------------------------------------------------
def use_probability(elapsed: Tensor, num_classes: Tensor | int, stream_length: float) -> Tensor:
    """(B,) probability that a stream sample is used. elapsed: (B,) samples since the first one of its class.
    num_classes: classes seen so far. stream_length: Z, twice it in multi-depth (card 1, FMS 2)."""
    return (elapsed * num_classes / stream_length).clamp(max=1)


def compose(used: Tensor, num_drawn: int, size: int) -> tuple[Tensor, Tensor]:
    """A batch of up to `size` from B stream samples, of which `used` (B,) bool, filled up with drawn exemplars.

    Returns positions (min(size, B + num_drawn),) int64 in (stream, drawn), used samples first, then exemplars, and
    which of them count (bool): unused samples fill the end where the memory is too small.
    """
    key = torch.cat([torch.where(used, 0, 2), torch.ones(num_drawn, dtype=torch.int64, device=used.device)])
    order = key.argsort(stable=True)[:size]
    return order, key[order] < 2


def relatives(parent: Tensor) -> Tensor:
    """(C, C) bool: whether one class is an ancestor of the other. parent: (C,) int64, -1 for a root."""
    kin = torch.zeros((len(parent), len(parent)), dtype=torch.bool)
    for child in range(len(parent)):
        above = int(parent[child])
        while above >= 0:
            kin[child, above] = kin[above, child] = True
            above = int(parent[above])
    return kin


def pseudo_labels(logits: Tensor, allowed: Tensor) -> Tensor:
    """(B,) the likeliest of the allowed classes, (B, C) bool, or -1 where none is."""
    found = logits.masked_fill(~allowed, -torch.inf).argmax(1)
    return torch.where(allowed.any(1), found, -1)


def frequent_label(targets: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """(C,) the label that most exemplars of each class were given; the class itself where none was.

    targets: (M,) int64; labels: (M,) int64, -1 for none. Ties go to the lowest id.
    """
    votes = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=targets.device)
    votes.index_add_(0, targets * num_classes + labels.clamp(min=0), (labels >= 0).to(torch.int64))
    most, label = votes.view(num_classes, num_classes).max(1)
    return torch.where(most > 0, label, torch.arange(num_classes, device=targets.device))


# -- the method ------------------------------------------------------------------------------------------------------
class PLFMS(ImportanceReplay):
    """CLIB's memory, FMS batches, pseudo-labels."""

    Config = PLFMSConfig
    graphable = True
    name = "plfms"

    def __init__(self, config: PLFMSConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self._length = config.ramp * (config.stream_length or setting.stream_length)
        self._level = setting.classes.level.to(setting.device)
        self._levels = range(setting.classes.num_levels)
        self._kin = relatives(setting.classes.parent).to(setting.device)
        own = torch.arange(setting.num_classes, device=setting.device)
        self.related = own[:, None].repeat(1, len(self._levels))  # (C, L) classes that may lose in a class's place

    def draw(self, batch: Batch) -> Prepared:
        """Store new samples; then those of the stream that are used, filled up from the memory."""
        step, rng = batch.at.step, self.setting.rng
        if self.remembers(batch):
            self.grow_heads(batch)
            related = self.related if self.config.variant == "paper" and len(self._levels) > 1 else None
            self.memory.add(batch.rows, batch.targets, batch.domain, related)
        size = len(batch.rows) + self.config.replay_batch_size
        drawn = self.memory.sample(size, rng("replay", step))
        order, valid = compose(self.used(batch), len(drawn), size)
        trained = torch.zeros(len(batch.rows) + len(drawn), dtype=torch.bool, device=order.device)
        self.memory.mark(drawn.slots, trained.index_copy(0, order, valid)[len(batch.rows) :])
        rows = torch.cat([batch.rows, drawn.rows])[order]
        targets = torch.cat([batch.targets, drawn.targets])[order]
        domain = None
        if batch.domain is not None and drawn.domain is not None:
            domain = torch.cat([batch.domain, drawn.domain])[order]
        images = self.setting.read(rows, domain, batch.phase.view, rng("batch-view", step))
        return self.prepared(images, targets, batch, valid)

    def used(self, batch: Batch) -> Tensor:
        """(B,) bool: stream samples that are trained on; all of the very first batch."""
        if self.memory.num_seen <= len(batch.rows):
            return torch.ones_like(batch.rows, dtype=torch.bool)
        met = self.memory.met
        elapsed = self.memory.num_seen - 1 - met[batch.targets]
        probability = use_probability(elapsed, (met < NEVER).sum(), self._length)
        rng = self.setting.rng("fms", batch.at.step)
        return torch.rand(len(batch.rows), generator=rng, device=elapsed.device) < probability

    def measured(self, logits: Tensor, targets: Tensor, seen: Tensor) -> None:
        """Pseudo-labels of all exemplars at each level, and what they say of their classes."""
        if self.config.variant == "released" or len(self._levels) == 1:
            return
        allowed = self._kin[targets] & (self.memory.met < NEVER)
        for level in self._levels:
            labels = pseudo_labels(logits, allowed & (self._level == level))
            self.related[:, level] = frequent_label(targets, labels, len(self._kin))

    @torch.no_grad()
    def grow_heads(self, batch: Batch) -> None:
        """Draw the head of a level anew as a class of it appears, if so asked."""
        if self.config.head_growth == "keep":
            return
        here = torch.zeros_like(self._level, dtype=torch.bool).index_fill(0, batch.targets, True)
        new = self._level[:, None] == torch.where(here & (self.memory.met == NEVER), self._level, -1)
        redrawn = new.any(1)  # (C,): a class of the same level is new
        assert isinstance(self.classifier, nn.Linear)
        rng, bound = self.setting.rng("head", batch.at.step), 1 / math.sqrt(self.classifier.in_features)
        for parameter in (self.classifier.bias, self.classifier.weight):
            fresh = torch.rand(parameter.shape, generator=rng, device=parameter.device) * (2 * bound) - bound
            chosen = redrawn if parameter.ndim == 1 else redrawn[:, None]
            parameter.copy_(torch.where(chosen, fresh, parameter))
            if self.config.head_growth == "bias":
                break


METHOD = PLFMS
