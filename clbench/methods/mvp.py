"""MVP: prompts and an instance-wise logit mask for a frozen vision transformer, with gradient-based sample weights.

Moon et al., ICCV 2023 (Si-Blurry); `mvp` card, from the runnable commit 61bd5eb of KHU-AGI/Si-Blurry. A query from the
frozen network picks one of a pool of expert prompts and, with it, a mask over the classes; general prompts are used for
all images. Prompts are tokens appended ahead of a block and cut off behind it. MVP-R is MVP with `capacity` above 0: a
reservoir, of which a batch is trained on beside the stream's.

Where the code differs from its evident intent, the default is the code's (card 1 and 5): `focal=released` weighs the
whole batch by one number, `prompt_loss=pairwise` compares all pairs of a batch, and the query leaves out the last block
(`use_last_layer=false`). The gradients behind the ignore scores have a closed form, so no backward pass per sample.

Differences from the official code:
- The head has all classes from the start, indexed by class id, not by order of appearance; unseen ones are masked.
- Its initial values are timm's for a head (truncated normal, 0.02; bias 0); the card does not give any.
- MVP-R stores the samples that the reservoir picks; the official update fails on their labels (card 5).
- No log of all queries is kept, and a last batch of one sample works.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import InputError
from clbench.memory.buffer import Buffer
from clbench.methods._softmax import siblings
from clbench.methods.base import Method, Setting, freeze, hp
from clbench.stream.types import Batch

GENERAL_BLOCKS = (0, 1)  # where prompts are appended; card 2
EXPERT_BLOCKS = (2, 3, 4)


@dataclass(frozen=True)
class MVPConfig:
    """Hyperparameters of MVP."""

    lr: float = hp(
        5e-3, "learning rate of Adam", low=0.0, high=10.0, scale="log", source="card 2",
        tune={"low": 5e-4, "high": 5e-2},
    )  # fmt: skip
    weight_decay: float = hp(0.0, "weight decay", low=0.0, high=1.0, scale="log", source="card 2")
    alpha: float = hp(0.5, "share of the loss that is weighted by the ignore score", low=0.0, high=1.0, source="card 2")
    gamma: float = hp(2.0, "power of the ignore score", low=0.0, high=100.0, source="card 2")
    margin: float = hp(0.5, "smallest divisor of the features", low=1e-3, high=100.0, source="card 2")
    prompts: int = hp(10, "expert prompts in the pool", low=1, high=10_000, source="card 2")
    general_length: int = hp(5, "tokens of the general prompt per block", low=1, high=1000, source="card 2")
    expert_length: int = hp(20, "tokens of an expert prompt per block", low=1, high=1000, source="card 2")
    capacity: int = hp(
        0, "exemplars in memory; above 0 it is MVP-R", low=0, high=10_000_000, unit="exemplars", source="card 2"
    )
    replay_batch_size: int = hp(
        32, "exemplars drawn per step", low=1, high=100_000, unit="exemplars", source="si_blurry card, section 2"
    )
    focal: str = hp(
        "released", "released: one weight for the batch, the mean of the scores' powers; intended: each sample its own",
        choices=("released", "intended"), source="card 1.9",
    )  # fmt: skip
    prompt_loss: str = hp(
        "pairwise", "pairwise: contrast over all pairs of the batch, as the code runs; own: each sample with itself; "
        "distance: no contrast, mean distance to the key picked, and no penalty of often used prompts",
        choices=("pairwise", "own", "distance"), source="card 1.10",
    )  # fmt: skip
    use_last_layer: bool = hp(False, "the query passes through all blocks, the last one too", source="card 1.1")
    use_mask: bool = hp(True, "multiply logits by the instance-wise mask", source="card 2")
    use_scaling: bool = hp(True, "adaptive feature scaling (AFS) in training", source="card 2")
    use_focal: bool = hp(True, "weigh the loss by gradient similarity (GSF)", source="card 2")


# -- the losses, as pure functions -----------------------------------------------------------------------------------
class Choice(NamedTuple):
    """distance: (B, P) 1 - cos(query, key); picked: (B,) int64 prompt of each sample; own: (B,) its distance."""

    distance: Tensor
    picked: Tensor
    own: Tensor


def choose_prompts(query: Tensor, keys: Tensor, counts: Tensor) -> Choice:
    """Pick for each query (B, d) the key (P, d) of smallest distance times (counts + 1); counts: (P,). Card 1.2."""
    distance = 1 - F.cosine_similarity(query[:, None], keys, dim=-1)
    picked = (distance * (counts + 1)).argmin(1)
    return Choice(distance, picked, distance.gather(1, picked[:, None])[:, 0])


def prompt_contrast(choice: Choice, keys: Tensor, counts: Tensor, pairwise: bool = True) -> Tensor:
    """0-d contrastive prompt loss: pulls the keys picked to their queries and keys apart (card 1.10).

    pairwise: the distances of sample i are divided by the usage of sample j's prompt, for all i and j, as the code's
    shapes work out; else by that of its own.
    """
    between = 1 - F.cosine_similarity(keys[:, None], keys, dim=-1)  # (P, P)
    usage = (counts + 1)[choice.picked]  # (B,)
    apart = between[choice.picked]  # (B, P)
    if pairwise:
        push = (apart[:, None] / usage[None, :, None]).exp().mean()
        pull = (choice.own[:, None] / usage).exp().mean()
    else:
        push, pull = (apart / usage[:, None]).exp().mean(), (choice.own / usage).exp().mean()
    return -(push / (pull + push) + 1e-6).log()


def masked_logits(logits: Tensor, mask: Tensor | None, open_classes: Tensor) -> Tensor:
    """(B, C) logits times the instance-wise mask (B, C), then -inf where a class isn't open ((C,) or (B, C) bool). The
    mask is positive and comes first: the other way round it would meet infinities. Card 1.5, 1.8."""
    if mask is not None:
        logits = logits * mask
    return logits.masked_fill(~open_classes, -torch.inf)


def own_gradients(features: Tensor, logits: Tensor, mask: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the head's row of each sample's own class: of its own cross entropy, and of the batch's
    mean; (B, D) each. features: (B, D); logits: (B, C) as `masked_logits` gives them. Card 1.6."""
    is_own = torch.arange(logits.shape[1], device=targets.device) == targets[:, None]
    excess = logits.softmax(1) - is_own.to(logits.dtype)
    if mask is not None:
        excess = excess * mask
    own = excess.gather(1, targets[:, None]) * features
    batch = (excess.T @ features / len(features))[targets]
    return own, batch


def ignore_scores(features: Tensor, logits: Tensor, mask: Tensor | None, targets: Tensor) -> Tensor:
    """(B,) in [0, 2]: 1 - cosine of the two gradients of `own_gradients`; high where a sample disagrees with the batch
    on its class."""
    own, batch = own_gradients(features, logits, mask, targets)
    return (1 - F.cosine_similarity(own, batch, dim=1)).clamp(min=0)


def feature_divisor(features: Tensor, weight: Tensor, targets: Tensor, margin: float) -> Tensor:
    """(B,) in [margin, 2 + margin]: 1 - cos(row of the own class, features) + margin, without gradient. Card 1.7."""
    return 1 - F.cosine_similarity(weight.detach()[targets], features.detach(), dim=1) + margin


def focal_loss(losses: Tensor, ignored: Tensor, alpha: float, gamma: float, form: str = "released") -> Tensor:
    """0-d loss from cross entropies (B,) and ignore scores (B,). Card 1.9."""
    weights = (1 - alpha) + alpha * ignored**gamma
    return losses.mean() * weights.mean() if form == "released" else (losses * weights).mean()


# -- the prompted transformer ----------------------------------------------------------------------------------------
class PromptPool(nn.Module):
    """General prompts (blocks, tokens, d), expert prompts (P, blocks, tokens, d), keys (P, d), mask logits (P, C), and
    how often each prompt was picked in training (P,) int64. Standard normal, mask logits -1."""

    def __init__(self, config: MVPConfig, width: int, num_classes: int) -> None:
        super().__init__()
        self.general = nn.Parameter(torch.randn(len(GENERAL_BLOCKS), config.general_length, width))
        self.expert = nn.Parameter(torch.randn(config.prompts, len(EXPERT_BLOCKS), config.expert_length, width))
        self.keys = nn.Parameter(torch.randn(config.prompts, width))
        self.mask = nn.Parameter(torch.full((config.prompts, num_classes), -1.0))
        self.counts: Tensor
        self.register_buffer("counts", torch.zeros(config.prompts, dtype=torch.int64))

    def masks(self, picked: Tensor) -> Tensor:
        """(B, C) in (0, 2), 0.538 at first. Card 1.4."""
        return 2 * self.mask[picked].sigmoid()


def find_transformer(backbone: nn.Module) -> Any:
    """The timm VisionTransformer inside a backbone; InputError if it isn't one that prompts fit into."""
    from timm.models.vision_transformer import VisionTransformer  # takes seconds to import

    net = getattr(backbone, "net", backbone)
    blocks = max(EXPERT_BLOCKS) + 1
    problem = None
    if not isinstance(net, VisionTransformer):
        problem = "is not one of timm's vision transformers"
    elif net.cls_token is None:
        problem = "has no class token"
    elif len(net.blocks) < blocks:
        problem = f"has {len(net.blocks)} blocks"
    if problem:
        raise InputError(
            f"mvp prompts the first {blocks} blocks of a vision transformer with a class token, but backbone "
            f"{getattr(backbone, 'name', type(net).__name__)} {problem}: choose one, such as --backbone vit-tiny-32 or "
            f"vit_base_patch16_224.orig_in21k"
        )
    return net


def embed(net: Any, images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, d) class token and patches, with positions."""
    tokens: Tensor = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(images))))
    return tokens


def query_of(net: Any, tokens: Tensor, last_layer: bool) -> Tensor:
    """(B, d) class token behind the last block, or behind the one before it; without the final norm. Card 1.1."""
    for block in net.blocks if last_layer else net.blocks[:-1]:
        tokens = block(tokens)
    return tokens[:, 0]


def prompted(net: Any, tokens: Tensor, general: Tensor, expert: Tensor) -> Tensor:
    """(B, d) normalised class token of a pass with prompts. general: (2, length, d); expert: (B, 3, length, d), of the
    prompts picked. Appended ahead of their block, cut off behind it. Card 1.3."""
    size, length, _ = tokens.shape
    for index, block in enumerate(net.blocks):
        if index in GENERAL_BLOCKS:
            prompt = general[GENERAL_BLOCKS.index(index)].expand(size, -1, -1)
            tokens = block(torch.cat([tokens, prompt], dim=1))[:, :length]
        elif index in EXPERT_BLOCKS:
            prompt = expert[:, EXPERT_BLOCKS.index(index)]
            tokens = block(torch.cat([tokens, prompt], dim=1))[:, :length]
        else:
            tokens = block(tokens)
    out: Tensor = net.fc_norm(net.norm(tokens)[:, 0])
    return out


# -- the method ------------------------------------------------------------------------------------------------------
class Drawn(NamedTuple):
    """Inputs of an update. images: (B, C, H, W); targets: (B,); seen: (C,) bool."""

    images: Tensor
    targets: Tensor
    seen: Tensor


class MVP(Method):
    """Frozen transformer, prompt pool, linear head; Adam over pool and head."""

    Config = MVPConfig
    graphable = True
    small_backbone = "vit-tiny-32"

    def __init__(self, config: MVPConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        self._net = find_transformer(backbone)
        freeze(backbone)
        self.pool = PromptPool(config, self._net.embed_dim, setting.num_classes)
        self.classifier = nn.Linear(self._net.embed_dim, setting.num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)
        self.optimizer = torch.optim.Adam(
            [*self.pool.parameters(), *self.classifier.parameters()], lr=config.lr, weight_decay=config.weight_decay
        )
        self.buffer = Buffer(config.capacity, setting.device, rule="exact")
        self._siblings = siblings(setting)

    def draw(self, batch: Batch) -> Drawn:
        """The stream batch, with a batch of exemplars behind it if there are any."""
        if len(self.buffer) == 0:
            return Drawn(batch.images, batch.targets, batch.seen)
        step, rng = batch.at.step, self.setting.rng
        drawn = self.buffer.sample(self.config.replay_batch_size, rng("replay", step))
        images = self.setting.read(drawn.rows, drawn.domain, batch.phase.view, rng("replay-view", step))
        return Drawn(torch.cat([batch.images, images]), torch.cat([batch.targets, drawn.targets]), batch.seen)

    def update(self, inputs: Drawn) -> Mapping[str, Tensor]:
        """Choose prompts, both losses, count the choice, one step of Adam."""
        images, targets, seen = inputs
        features, choice = self.encode(images)
        open_classes = seen if self._siblings is None else seen & self._siblings[targets]
        loss = self.classifier_loss(features, choice.picked, targets, open_classes)
        contrast = self.prompt_loss(choice)
        self.pool.counts.index_add_(0, choice.picked, torch.ones_like(choice.picked))
        self.optimizer.zero_grad()
        (loss + contrast).backward()
        self.optimizer.step()
        return {"loss": loss.detach(), "prompt_loss": contrast.detach()}

    def keep(self, batch: Batch) -> None:
        """The reservoir sees each sample of the stream once, behind the last update on it."""
        if batch.last_update and batch.epoch == 0:
            self.buffer.add(batch.rows, batch.targets, self.setting.rng("reservoir", batch.at.step), batch.domain)

    def encode(self, images: Tensor) -> tuple[Tensor, Choice]:
        """(B, d) features of the prompted pass, and which prompts were picked; the counts stay as they are."""
        with torch.no_grad():
            tokens = embed(self._net, images)
            query = query_of(self._net, tokens, self.config.use_last_layer)
        choice = choose_prompts(query, self.pool.keys, self.usage())
        return prompted(self._net, tokens, self.pool.general, self.pool.expert[choice.picked]), choice

    def usage(self) -> Tensor:
        """(P,) counts that penalise often used prompts; 0 without the contrastive loss."""
        counts = self.pool.counts
        return torch.zeros_like(counts) if self.config.prompt_loss == "distance" else counts

    def prompt_loss(self, choice: Choice) -> Tensor:
        """0-d, with the counts that the choice was made with."""
        if self.config.prompt_loss == "distance":
            return choice.own.mean()
        pairwise = self.config.prompt_loss == "pairwise"
        return prompt_contrast(choice, self.pool.keys, self.pool.counts, pairwise)

    def classifier_loss(self, features: Tensor, picked: Tensor, targets: Tensor, open_classes: Tensor) -> Tensor:
        """0-d weighted cross entropy on scaled features (card 1.6 to 1.9)."""
        config, mask = self.config, self.pool.masks(picked) if self.config.use_mask else None
        scaled = features
        if config.use_scaling:
            scaled = features / feature_divisor(features, self.classifier.weight, targets, config.margin)[:, None]
        logits = masked_logits(self.classifier(scaled), mask, open_classes)
        losses = F.cross_entropy(logits, targets, reduction="none")
        if not config.use_focal:
            return losses.mean()
        with torch.no_grad():
            plain = masked_logits(self.classifier(features), mask, open_classes)
            ignored = ignore_scores(features, plain, mask, targets)
        return focal_loss(losses, ignored, config.alpha, config.gamma, config.focal)

    # -- answers -----------------------------------------------------------------------------------------------------
    def features(self, images: Tensor, task: int | None) -> Tensor:
        """(B, d + C): features of the prompted pass, then the instance-wise mask, which the logits need beside them."""
        features, choice = self.encode(images)
        return torch.cat([features, self.pool.masks(choice.picked)], dim=1)

    def classify(self, features: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        """(W f + b) * M: no feature scaling at test (card 6)."""
        width = self.classifier.in_features
        out: Tensor = self.classifier(features[:, :width])
        if self.config.use_mask:
            out = out * features[:, width:]
        return out

    def memory_bytes(self) -> dict[str, int]:
        return {"buffer": self.buffer.num_bytes(self.setting.image_bytes)} if self.config.capacity else {}


METHOD = MVP
