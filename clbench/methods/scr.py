"""SCR: supervised contrastive replay, answered by the nearest mean of the exemplars.

Idea: no softmax head that could favour the latest classes. Stream and a large replay batch are drawn together in two
views, features of one class attract each other (SupCon), and an image gets the class whose exemplars it is nearest to.

Paper: Mai, Li, Kim, Sanner 2021 (arXiv 2103.13885). Official code: RaptorMai/online-continual-learning (card
`online_baselines`, section 2.6). Per stream batch:

    draw 100 exemplars; X = [exemplars; stream], raw and augmented in two forward passes (each with its own batch-norm
    statistics); SupCon over both views of the projections; one SGD step; reservoir.

Nothing is learned before the memory holds something, so the first batch only fills it. Behind each task the review
trick: one pass over the memory in whole batches, the same loss with the gradient divided by 10.

Same as the official code: order of X, projection, a class seen without exemplars answers with a random direction.
Different: views are batched tensor code instead of kornia's (the same operations and ranges); the temperature is the
paper's 0.1 (its README has 0.07); classes count as seen from their first sample, not from the end of their task.
Augmentation is the run's training view (a recipe's `train_view`); where it equals the test view both views are equal.

Cost of watching: the means need all M exemplars in eval mode after every change. They are computed once per observation
and kept for its chunks (`_exemplar_means.ExemplarMeans`), so each observation costs M forward passes more.

Shapes: B images of one view, D features, P outputs of the projection, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.memory.buffer import Buffer
from clbench.methods._exemplar_means import ExemplarMeans, mean_scores
from clbench.methods._softmax import OptimizerConfig, make_optimizer, width_of
from clbench.methods.base import Method, Setting, hp
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Phase

__all__ = ["METHOD", "SCR", "SCRConfig", "supcon_loss"]

REVIEW_SCALE = 0.1  # the review's gradient is divided by 10


@dataclass(frozen=True)
class SCRConfig(OptimizerConfig):
    capacity: int = hp(1000, "exemplars in memory", low=1, high=10_000_000, unit="exemplars")
    replay_batch_size: int = hp(
        100, "exemplars drawn per step, and per step of the review", low=1, high=100_000, source="card 2.6"
    )
    reservoir: str = hp(
        "batch", "reservoir rule: one draw range per batch (the field's code) or per sample (textbook)",
        choices=("batch", "exact"), source="card 2.1",
    )  # fmt: skip
    temperature: float = hp(
        0.1, "temperature of the contrastive loss", low=1e-3, high=100.0, scale="log",
        source="card 2.6: paper's configuration (README: 0.07)", tune={"low": 0.05, "high": 0.5},
    )  # fmt: skip
    projection: int = hp(128, "outputs of the projection", low=1, high=100_000, source="card 2.6")
    review: bool = hp(True, "review trick: one pass over the memory behind each task", source="card 2.6, config_CVPR")


def supcon_loss(first: Tensor, second: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss over two views, contrast mode `all`; mean over the 2B anchors i of

        -1/|P(i)| sum_{p in P(i)} [ z_i z_p / t - log sum_{a != i} exp(z_i z_a / t) ],  P(i): same class, not i.

    first, second: (B, P) projections of any length (normalised here); targets: (B,) int64. The other view of an image
    is always a positive, so a class with one sample is no special case. 0-d.
    """
    z = F.normalize(torch.cat([first, second]), dim=1)
    labels = targets.repeat(2)
    own = torch.eye(len(labels), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels) & ~own
    logits = (z @ z.T / temperature).masked_fill(own, -torch.inf)
    log_prob = logits - logits.logsumexp(dim=1, keepdim=True)
    return -(torch.where(positive, log_prob, 0).sum(dim=1) / positive.sum(dim=1)).mean()


class Views(NamedTuple):
    """What one update computes with: two views (B, C, H, W) of the same images, (B,) int64 targets, 0-d factor of the
    gradient."""

    raw: Tensor | None
    augmented: Tensor | None
    targets: Tensor | None
    scale: Tensor | None


NOTHING = Views(None, None, None, None)


class SCR(Method):
    """See the module."""

    Config = SCRConfig
    graphable = True
    aliases = ("supervised-contrastive-replay",)
    config: SCRConfig

    def __init__(self, config: SCRConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        width = width_of(backbone)
        self.projection = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.projection))
        self.optimizer = make_optimizer(config, [*backbone.parameters(), *self.projection.parameters()])
        self.buffer = Buffer(config.capacity, setting.device, rule=config.reservoir)
        self.seen = torch.zeros(setting.num_classes, dtype=torch.bool, device=setting.device)
        self.version = 0  # steps done: weights and memory are those of this number
        self._scales = torch.tensor([1.0, REVIEW_SCALE], device=setting.device).unbind()
        self._means = ExemplarMeans(setting)
        self._width = width

    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        phases = [Phase("train")]
        batches = self.config.capacity // self.config.replay_batch_size
        if self.config.review and batches > 0:
            phases.append(Phase("review", source="none", iterations=batches))
        return phases

    def draw(self, batch: Batch) -> Views:
        """What this step learns from; nothing while the memory is empty, or once the review's batches are used up."""
        read, rng, step = self.setting.read, self.setting.rng, batch.at.step
        size, view = self.config.replay_batch_size, batch.phase.view
        if batch.phase.name == "train":
            if len(self.buffer) == 0:
                return NOTHING
            drawn = self.buffer.sample(size, rng("replay", step))
            raw = [read(drawn.rows, drawn.domain, "raw"), read(batch.rows, batch.domain, "raw")]
            augmented = [read(drawn.rows, drawn.domain, view, rng("replay-view", step)), batch.images]
            targets = torch.cat([drawn.targets, batch.targets])
            return Views(torch.cat(raw), torch.cat(augmented), targets, self._scales[0])
        start = batch.at.iteration * size
        if start + size > len(self.buffer):
            return NOTHING
        order = torch.randperm(len(self.buffer), generator=rng("review", batch.at.task), device=self.setting.device)
        drawn = self.buffer.take(order[start : start + size])
        return Views(
            read(drawn.rows, drawn.domain, "raw"), read(drawn.rows, drawn.domain, view, rng("review-view", step)),
            drawn.targets, self._scales[1],
        )  # fmt: skip

    def update(self, inputs: Views) -> Mapping[str, Tensor]:
        """SupCon over two forward passes, one step of the optimiser."""
        raw, augmented, targets, scale = inputs
        if raw is None or augmented is None or targets is None or scale is None:
            return {}
        self.optimizer.zero_grad()
        first, second = (self.projection(self.backbone(view)) for view in (raw, augmented))
        with torch.autocast(self.setting.device.type, enabled=False):  # similarities over a small temperature
            loss = supcon_loss(first.float(), second.float(), targets, self.config.temperature)
        (scale * loss).backward()
        self.optimizer.step()
        return {"loss": loss.detach()}

    def keep(self, batch: Batch) -> None:
        self.version += 1
        self.seen |= batch.seen
        if batch.phase.name == "train" and batch.last_update and batch.epoch == 0:
            self.buffer.add(batch.rows, batch.targets, self.setting.rng("reservoir", batch.at.step), batch.domain)

    # -- answers -----------------------------------------------------------------------------------------------------
    def features(self, images: Tensor, task: int | None) -> Tensor:
        """(B, C, H, W) -> (B, D) encoder features of length 1, before the projection."""
        return F.normalize(self.backbone(images), dim=1)

    def classify(self, features: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        means = self._means(self.version, self.buffer, self.backbone, self._width)
        with torch.autocast(self.setting.device.type, enabled=False):
            return mean_scores(features.float(), means, self.seen)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        super().load_state_dict(state)
        self._means.forget()

    def memory_bytes(self) -> dict[str, int]:
        return {"buffer": self.buffer.num_bytes(self.setting.image_bytes)}


METHOD = SCR
