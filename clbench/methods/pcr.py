"""PCR: proxy-based contrastive replay. Samples are drawn to the proxies (class vectors) of the classes in the batch.

Lin et al., CVPR 2023 (arXiv 2304.04408), card `hpcr`. Per step: the stream batch and its augmented copy in one forward
pass, a replay batch and its augmented copy in another (each with its own batch-norm statistics), one loss over all of
their rows, one step; then the reservoir sees the batch. Until the memory holds something nothing is learned. An answer
is the proxy with the largest cosine.

The official loss puts one proxy per *row* into the contrast set, so a class that has n rows counts n times. That equals
a cross entropy over the classes of the batch with scores s_c + log n_c, plus a constant; this form is O(B C).

Differences from the official code: augmented images don't pass through 8 bits; the un-augmented image is the view
`raw`, the augmented one the view `train` (no augmentation of its own); unseen classes are masked in answers as in the
code of 2026 (that of 2023: `--mask all`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.memory.buffer import Buffer, Exemplars
from clbench.methods._proxy import class_counts, cosine_scores, unit
from clbench.methods._softmax import OptimizerConfig, make_optimizer, width_of
from clbench.methods.base import Head, Method, Setting, hp
from clbench.stream.types import Batch

__all__ = ["PCR", "PCRConfig", "pcr_loss"]


def pcr_loss(features: Tensor, proxies: Tensor, targets: Tensor, temperature: float, contrast: str = "proxy") -> Tensor:
    """Contrastive loss of rows against proxies, 0-d. features: (B, D), proxies: (C, D), both raw; targets: (B,) int64.

    contrast `proxy`: anchors are the rows, the contrast set is one proxy per row (the default of the official code);
    `one`: also all other rows, with the rows of the anchor's class as positives; `all`: the proxies are anchors too.
    """
    f, w = unit(features), unit(proxies)
    counts = class_counts(targets, len(proxies), torch.promote_types(features.dtype, torch.float32))
    log_counts = counts.log()  # -inf for classes that are not in the batch
    scores = f @ w.T / temperature
    if contrast == "proxy":
        return F.cross_entropy(scores + log_counts, targets) + log_counts[targets].mean()

    own = counts[targets]
    itself = torch.eye(len(f), dtype=torch.bool, device=f.device)
    similar = f @ f.T / temperature
    partner = (targets[:, None] == targets) & ~itself
    contrasts = torch.cat([similar.masked_fill(itself, -torch.inf), scores + log_counts], dim=1)
    positives = (similar * partner).sum(1) + own * scores.gather(1, targets[:, None])[:, 0]
    rows = contrasts.logsumexp(1) - positives / (2 * own - 1)
    if contrast == "one":
        return rows.mean()

    between = w @ w.T / temperature
    others = (counts - torch.eye(len(w), device=w.device)).clamp_min(0)  # proxies in the set besides the anchor itself
    contrasts = torch.cat([scores.T, between + others.log()], dim=1)
    mine = F.one_hot(targets, len(w)).to(scores.dtype)
    positives = (mine * scores).sum(0) + (counts - 1) * between.diagonal()
    anchors = counts * (contrasts.logsumexp(1) - positives / (2 * counts - 1))  # one per row, so n_c of class c
    return (rows.sum() + anchors.sum()) / (2 * len(f))


@dataclass(frozen=True)
class PCRConfig(OptimizerConfig):
    """Hyperparameters of PCR."""

    capacity: int = hp(1000, "exemplars in memory", low=1, high=10_000_000, unit="exemplars", source="card 3")
    replay_batch_size: int = hp(10, "exemplars drawn per step", low=1, high=100_000, source="card 3")
    reservoir: str = hp(
        "batch", "reservoir rule: one draw range per batch (the field's code) or per sample (textbook)",
        choices=("batch", "exact"), source="online_baselines card 2.1",
    )  # fmt: skip
    temperature: float = hp(
        0.09, "temperature of the cosines", low=1e-3, high=10.0, scale="log", source="card 3",
        tune={"low": 0.05, "high": 0.2},
    )  # fmt: skip
    contrast: str = hp(
        "proxy", "contrast set: proxies, proxies and rows (one), or with proxies as anchors too (all)",
        choices=("proxy", "one", "all"), source="card 2: pcr_type, proxy in the README",
    )  # fmt: skip


class Drawn(NamedTuple):
    """What one update computes with. stream: (2B, C, H, W), the images as they are, then augmented; replay likewise
    (2m, C, H, W), and targets (m,); None while the memory is empty.

    HPCR adds scale: 0-d, factor of the contrastive loss; logits (m, C) and features (m, D) as stored, from task 1 on.
    """

    batch: Batch
    stream: Tensor
    replay: Tensor | None = None
    targets: Tensor | None = None
    scale: Tensor | None = None
    logits: Tensor | None = None
    features: Tensor | None = None


class PCR(Method):
    """Encoder, one proxy per class, reservoir."""

    Config = PCRConfig
    settings = frozenset({"class", "domain"})
    aliases = ("proxy-contrastive-replay",)
    graphable = True

    def __init__(self, config: PCRConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        width = width_of(backbone)
        self.proxies = nn.Linear(width, setting.num_classes, bias=False)
        self.optimizer = make_optimizer(config, [*backbone.parameters(), *self.proxies.parameters()])
        shapes = self.payload_shapes(width)
        self.buffer = Buffer(config.capacity, setting.device, payload=shapes, rule=config.reservoir)
        self._payload = {  # of this step's stream batch
            name: torch.zeros((setting.batch_size, *shape), device=setting.device) for name, shape in shapes.items()
        }

    def draw(self, batch: Batch) -> Drawn:
        """Both views of the batch, and of exemplars to go with it."""
        read, rng, step = self.setting.read, self.setting.rng, batch.at.step
        stream = torch.cat([read(batch.rows, batch.domain, "raw"), batch.images])
        if len(self.buffer) == 0:
            return Drawn(batch, stream)
        drawn = self.buffer.sample(self.config.replay_batch_size, rng("replay", step))
        plain = read(drawn.rows, drawn.domain, "raw")
        augmented = read(drawn.rows, drawn.domain, batch.phase.view, rng("replay-view", step))
        return Drawn(batch, stream, torch.cat([plain, augmented]), drawn.targets, **self.recalled(drawn, batch))

    def update(self, inputs: Drawn) -> Mapping[str, Tensor]:
        """Two forward passes, one loss over all rows, one step of the optimiser."""
        fresh = self.backbone(inputs.stream)
        for name, value in self.payload(fresh[: len(fresh) // 2].detach()).items():
            self._payload[name][: len(value)].copy_(value)
        if inputs.replay is None:
            return {}
        losses = self.losses(self.backbone(inputs.replay), fresh, inputs)
        self.optimizer.zero_grad()
        losses["loss"].backward()
        self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    def keep(self, batch: Batch) -> None:
        """The reservoir sees each sample of the stream once, un-augmented."""
        if batch.last_update and batch.epoch == 0:
            rng, count = self.setting.rng("reservoir", batch.at.step), len(batch.rows)
            payload = {name: value[:count] for name, value in self._payload.items()}
            self.buffer.add(batch.rows, batch.targets, rng, batch.domain, **payload)

    def losses(self, replayed: Tensor, fresh: Tensor, inputs: Drawn) -> dict[str, Tensor]:
        """What is minimised, as `loss`. replayed: (2m, D), fresh: (2B, D) features."""
        assert inputs.targets is not None
        targets = torch.cat([inputs.targets.repeat(2), inputs.batch.targets.repeat(2)])
        features = torch.cat([replayed, fresh])
        return {"loss": pcr_loss(features, self.proxies.weight, targets, self.config.temperature, self.config.contrast)}

    def recalled(self, drawn: Exemplars, batch: Batch) -> dict[str, Tensor]:
        """Further fields of `Drawn`."""
        return {}

    def payload_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """What is stored with an exemplar."""
        return {}

    def payload(self, features: Tensor) -> dict[str, Tensor]:
        """What is stored with the stream batch, from its (B, D) features."""
        return {}

    def classify(self, features: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        return cosine_scores(features, self.proxies.weight, self.config.temperature)

    def head(self, task: int | None) -> Head:
        return Head("cosine", self.proxies.weight, None, 1 / self.config.temperature, eps=1e-6)

    def memory_bytes(self) -> dict[str, int]:
        return {"buffer": self.buffer.num_bytes(self.setting.image_bytes)}


METHOD = PCR
