"""OnPro: online prototype learning, class means of two views told apart, and confusable classes mixed.

Idea: means of the classes in a batch (online prototypes) are learned by contrast (OPE), and tell which classes are
close to each other, so that replay mixes those more often (APF); instances are learned by OCM's contrast over 16 turned
variants of each image.

Paper: Wei et al., ICCV 2023 (arXiv 2308.00301). Official code: weilllllls/OnPro (card `onpro`). T is a random view
(flip, grey, crop), R the 16 variants. In the first task

    L = CE(T(x)) + INS(R(x), T(R(x))) + OPE(stream) + OPE(replay)

later, with m the replay batch after APF (not in the first batch of a task):

    L = CE(T(m)) + INS(R(x), T(R(x))) + INS(R(m), T(R(m))) + OPE(stream) + OPE(replay before APF)

so that the stream has no cross entropy there. One Adam step, then the reservoir.

Same as the official code, where it leaves the paper: `ins_weight` does not act in the first task; contrastive labels of
mixed exemplars are real numbers, matched by equality; the prototypes that APF looks at are those of the last replay
batch, so that classes without exemplars in it are never mixed on purpose.
Different: classes of the running task count as seen from its first batch (they set the size of the replay batch, 7 per
class); crops are antialiased; with fewer than two prototypes, where the code stops, exemplars stay as they are.

The whole step costs 2 * variants * (B + n) + 3n images; `variants` below 16 is an ablation.

Shapes: B stream batch, n replay batch, V variants, D features, P outputs of the projection, C classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.data.views import parse_view
from clbench.errors import InputError
from clbench.memory.buffer import Buffer, Exemplars
from clbench.methods._softmax import width_of
from clbench.methods.base import Head, Method, Setting, hp
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Phase

__all__ = [
    "METHOD",
    "OnPro",
    "OnProConfig",
    "class_means",
    "instance_loss",
    "mixed_cross_entropy",
    "ope_loss",
    "pair_counts",
    "turned",
]

EPS = 1e-8  # of the instance loss


@dataclass(frozen=True)
class OnProConfig:
    lr: float = hp(5e-4, "learning rate of Adam", low=0.0, high=10.0, scale="log", source="card onpro, section 3",
                   tune={"low": 1e-4, "high": 1e-2})  # fmt: skip
    beta2: float = hp(0.99, "second decay of Adam; the first is 0.9", low=0.0, high=0.99999, source="card, section 3")
    weight_decay: float = hp(1e-4, "weight decay", low=0.0, high=1.0, scale="log", source="card, section 3")
    capacity: int = hp(1000, "exemplars in memory", low=1, high=10_000_000, unit="exemplars")
    replay_batch_size: int = hp(64, "exemplars drawn per step, at most", low=1, high=100_000, source="card, section 3")
    replay_per_class: int = hp(
        7, "exemplars drawn per class seen, at most, behind the first task", low=1, high=100_000, source="card 2"
    )
    reservoir: str = hp(
        "batch", "reservoir rule: one draw range per batch (the field's code) or per sample (textbook)",
        choices=("batch", "exact"), source="online_baselines card, 2.1",
    )  # fmt: skip
    ins_temperature: float = hp(0.07, "temperature of the instance loss", low=1e-3, high=100.0, source="card 2")
    ins_weight: float = hp(
        1.0, "weight lambda inside the instance similarity behind the first task", low=0.0, high=100.0,
        source="card 2: 0.5 for CIFAR-10, 1 otherwise",
    )  # fmt: skip
    proto_temperature: float = hp(0.5, "temperature of the prototype loss", low=1e-3, high=100.0, source="card 2")
    base_rate: float = hp(
        0.9, "share of the replay batch that is drawn evenly", low=0.0, high=1.0, source="card, section 3: CIFAR-100"
    )
    mixup_p: float = hp(0.2, "probability of mixing", low=0.0, high=1.0, source="card, section 3: CIFAR-100")
    mixup_high: float = hp(0.6, "largest share of the partner in an even draw", low=0.0, high=1.0, source="card 2")
    mixup_alpha: float = hp(0.4, "of Beta(alpha, alpha), the share in a pair", low=1e-3, high=100.0, source="card 2")
    projection: int = hp(128, "outputs of the projection, at most as many as features", low=1, high=100_000)
    variants: int = hp(
        16, "turned variants of each image in the instance loss", choices=(1, 2, 4, 8, 16), source="card 2"
    )
    augmentation: str = hp(
        "flip gray(0.25) random_resized_crop({size},scale=0.3:1)",
        "the random view T, on top of the images as the network gets them; {size}: their side", source="card 2",
    )  # fmt: skip


# -- images ----------------------------------------------------------------------------------------------------------
def turned(images: Tensor, variants: int = 16) -> Tensor:
    """R: (n, C, S, S) -> (variants * n, C, S, S), variant by variant, the image itself first.

    Four ways to turn the left and right half by 180 degrees (none, left, both, right), each of them turned as a whole
    by 0, 180, 90 and 270 degrees.
    """
    half = images.shape[3] // 2
    left, right = images[..., :half], images[..., half:]
    left_turned, right_turned = left.flip(2, 3), right.flip(2, 3)
    pairs = [(left, right), (left_turned, right), (left_turned, right_turned), (left, right_turned)]
    inner = torch.cat([torch.cat(pair, dim=3) for pair in pairs])
    whole = torch.cat([torch.rot90(inner, turn, (2, 3)) for turn in (0, 2, 1, 3)])
    return whole[: variants * len(images)]


# -- losses ----------------------------------------------------------------------------------------------------------
def class_means(features: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """(B, P) features, (B,) int64 targets -> means (C, P), 0 for a class without samples, and counts (C,)."""
    member = (targets == torch.arange(num_classes, device=targets.device)[:, None]).to(features.dtype)
    counts = member.sum(dim=1)
    return (member @ features) / counts.clamp(min=1)[:, None], counts


def ope_loss(
    first: Tensor, second: Tensor, targets: Tensor, num_classes: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Online prototype equilibrium: contrast of the K classes present. Their means in two views, brought to length 1,
    are 2K points; the other view of a class is its positive, the other 2K - 2 are negatives.

    first, second: (B, P) of length 1; targets: (B,) int64. Returns the 0-d loss and both views' means (C, P), their
    length as it comes, 0 for absent classes, which take no part.
    """
    (one, counts), (two, _) = class_means(first, targets, num_classes), class_means(second, targets, num_classes)
    points = F.normalize(torch.cat([one, two]), dim=1)
    present = (counts > 0).repeat(2)
    own = torch.eye(len(points), dtype=torch.bool, device=points.device)
    logits = (points @ points.T / temperature).masked_fill(own | ~present, -torch.inf)
    positive = logits.roll(num_classes, dims=1).diagonal()
    each = torch.where(present, logits.logsumexp(dim=1) - positive, 0)
    return each.sum() / present.sum(), one, two


def instance_loss(similarity: Tensor, labels: Tensor, temperature: float, *, plain: bool) -> Tensor:
    """OCM's instance contrast on the (2N, 2N) similarities of two views of N images; labels: (N,), matched by equality.

    With q_ij = exp(s_ij / t) / sum_k exp(s_ik / t) and c = -log(q + eps): the mean over rows of the mean c of equal
    labels, themselves included. plain=True stops there (`_uni` of the code, for replay). plain=False (`_n`, for the
    stream) leaves the diagonal out of every sum (q_ii = 0), counts that mean twice, and adds c of the other view.
    """
    size = len(similarity)
    half = size // 2
    weight = ((similarity - similarity.amax(dim=1, keepdim=True).detach()) / temperature).exp()
    if not plain:
        weight = weight * ~torch.eye(size, dtype=torch.bool, device=similarity.device)
    cost = -(weight / (weight.sum(dim=1, keepdim=True) + EPS) + EPS).log()
    both = labels.repeat(2)
    same = (both[:, None] == both).to(similarity.dtype)
    by_class = (same / (same.sum(dim=1, keepdim=True) + EPS) * cost).sum() / size
    if plain:
        return by_class
    return 2 * by_class + cost.roll(half, dims=1).diagonal().sum() / size


def mixed_cross_entropy(logits: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Mean of (1 - share) CE(first) + share CE(second). logits: (n, C); first, second: (n,) int64; share: (n,). 0-d."""
    own, other = (F.cross_entropy(logits, targets, reduction="none") for targets in (first, second))
    return ((1 - share) * own + share * other).mean()


def pair_counts(means: Tensor, total: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """How many of `total` mixed exemplars each pair of classes gets: in proportion to softmax(1 / |mu_a - mu_b|) over
    the pairs of classes with a mean, rounded, and put right by one for randomly drawn pairs.

    means: (C, P), 0 for a class without one. uniform: (C (C - 1) / 2,) in [0, 1). Returns pairs (2, C (C - 1) / 2)
    int64 of class ids and counts of the same length. Their sum is `total` where there are two means or more, else 0.
    """
    known = means.abs().sum(dim=1) > 0
    pairs = torch.triu_indices(len(means), len(means), 1, device=means.device)
    open_pair = known[pairs[0]] & known[pairs[1]]
    distance = (means[pairs[0]] - means[pairs[1]]).norm(dim=1).clamp(min=1e-12)
    closeness = (1 / distance).masked_fill(~open_pair, -torch.inf)
    likely = torch.where(open_pair, (closeness - closeness.amax()).exp(), 0)
    counts = (likely / likely.sum().clamp(min=1e-30) * total).round().long() * open_pair
    for _ in range(2):  # one more or less for some; a second round if there are fewer pairs than that
        missing = torch.where(open_pair.any(), total - counts.sum(), 0)
        eligible = torch.where(missing > 0, open_pair, counts > 0)
        order = uniform.masked_fill(~eligible, 2.0).argsort(stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = counts + missing.sign() * ((rank < missing.abs()) & eligible)
    return pairs, counts


# -- the method ------------------------------------------------------------------------------------------------------
class Mix(NamedTuple):
    """A replay batch after APF: images (n, C, S, S), both targets (n,) int64, share of the second (n,)."""

    images: Tensor
    first: Tensor
    second: Tensor
    share: Tensor


class Inputs(NamedTuple):
    """What one update computes with; all views are drawn.

    stream: (2VB, ...) R(x) and T(R(x)); targets: (B,). replay: (2Vn, ...) of the mixed batch, labels: (Vn,) its real
    labels; None in the first task. classified: images of the cross entropy with their Mix targets. prototypes: (2n,
    ...) replay as drawn and its T, with targets; None while the memory is empty. offsets: (2,) int64, where F_r begins.
    """

    stream: Tensor
    targets: Tensor
    replay: Tensor | None
    labels: Tensor | None
    classified: Mix
    prototypes: Tensor | None
    prototype_targets: Tensor | None
    offsets: Tensor


class OnPro(Method):
    """See the module. Class-incremental with known task numbers."""

    Config = OnProConfig
    settings = frozenset({"class"})
    graphable = True
    quick: ClassVar[Mapping[str, Any]] = {"variants": 2, "replay_batch_size": 8}
    config: OnProConfig

    def __init__(self, config: OnProConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        _, height, side = setting.image_shape
        if height != side:
            raise InputError(f"onpro turns images by 90 degrees, but they are {height} x {side}: crop them in the view")
        width = width_of(backbone)
        self._slice = min(config.projection, width)
        self.classifier = nn.Linear(width, setting.num_classes)
        self.projection = nn.Linear(width, self._slice)
        self.optimizer = torch.optim.Adam(
            [*backbone.parameters(), *self.classifier.parameters(), *self.projection.parameters()],
            lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay,
        )  # fmt: skip
        self.buffer = Buffer(config.capacity, setting.device, rule=config.reservoir)
        self.prototypes = torch.zeros((setting.num_classes, self._slice), device=setting.device)
        self._view = parse_view(config.augmentation.replace("{size}", str(side)))
        if tuple(self._view.output_shape((setting.image_shape[0], height, side))) != tuple(setting.image_shape):
            raise InputError(f"onpro's augmentation {self._view.text!r} changes the size of the images; keep it")
        self._num_seen = [
            len({c for classes in setting.task_classes[: task + 1] for c in classes.tolist()})
            for task in range(len(setting.task_classes))
        ]

    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        return [Phase("train", view="raw")]

    # -- draws -------------------------------------------------------------------------------------------------------
    def draw(self, batch: Batch) -> Inputs:
        config, at, variants = self.config, batch.at, self.config.variants
        width = width_of(self.backbone)
        uniform = torch.rand(2, generator=self.setting.rng("slice", at.step), device=self.setting.device)
        offsets = (uniform * max(width - self._slice, 1)).long()
        turns = turned(batch.images, variants)
        stream = torch.cat([turns, self._random(turns, "stream", at.step)])
        if at.task == 0 or len(self.buffer) == 0:
            prototypes = held = None
            if len(self.buffer) > 0:
                held = self.buffer.sample(config.replay_batch_size, self.setting.rng("replay", at.step))
                prototypes = self._read(held)
            share = torch.zeros_like(batch.targets, dtype=batch.images.dtype)
            own = Mix(self._random(batch.images, "classified", at.step), batch.targets, batch.targets, share)
            return Inputs(
                stream, batch.targets, None, None, own, self._pair(prototypes, at.step),
                None if held is None else held.targets, offsets,
            )  # fmt: skip
        size = min(config.replay_batch_size, config.replay_per_class * self._num_seen[at.task])
        held = self.buffer.sample(size, self.setting.rng("replay", at.step))
        images = self._read(held)
        mix = Mix(images, held.targets, held.targets, torch.zeros_like(held.targets, dtype=images.dtype))
        if at.iteration > 0:
            mix = self._feedback(held, images, at.step)
        turns = turned(mix.images, variants)
        replay = torch.cat([turns, self._random(turns, "replay-turned", at.step)])
        labels = (1 - mix.share.double()) * mix.first + mix.share.double() * mix.second
        labels = torch.cat([labels + self.setting.num_classes * v for v in range(variants)])
        classified = mix._replace(images=self._random(mix.images, "classified", at.step))
        return Inputs(
            stream, batch.targets, replay, labels, classified, self._pair(images, at.step), held.targets, offsets
        )

    def _feedback(self, held: Exemplars, images: Tensor, step: int) -> Mix:
        """APF: a share of the drawn exemplars, mixed among each other, and pairs of close classes from the memory."""
        config, device = self.config, images.device
        size = len(held)
        rng = self.setting.rng("feedback", step)
        even = int(size * config.base_rate)
        chosen = torch.randperm(size, generator=rng, device=device)
        base, rest = chosen[:even], chosen[even:]
        partner = base[torch.randperm(even, generator=rng, device=device)]
        applied = torch.rand(1, generator=rng, device=device) < config.mixup_p
        share = torch.rand(even, generator=rng, device=device) * config.mixup_high * applied
        if even == size:
            return blend(images[base], images[partner], held.targets[base], held.targets[partner], share)
        first, second, pair_share = self._pairs(held.slots[rest], rng)
        mixed = blend(images[base], images[partner], held.targets[base], held.targets[partner], share)
        paired = blend(self._read(first), self._read(second), first.targets, second.targets, pair_share)
        return Mix(*(torch.cat(parts) for parts in zip(mixed, paired, strict=True)))

    def _pairs(self, spare: Tensor, rng: torch.Generator) -> tuple[Exemplars, Exemplars, Tensor]:
        """Exemplars of close classes and the share of the second, one pair for each of the slots `spare` (r,), which
        stand in, unmixed, where there is no pair."""
        config, device, num_classes = self.config, spare.device, self.setting.num_classes
        draws = torch.rand((2, num_classes * (num_classes - 1) // 2), generator=rng, device=device)
        pairs, counts = pair_counts(self.prototypes, len(spare), draws[0])
        ends = counts.cumsum(0)
        place = torch.arange(len(spare), device=device)
        index = torch.searchsorted(ends, place, right=True).clamp(max=len(ends) - 1)
        held = torch.arange(num_classes, device=device)[:, None] == self.buffer.targets
        number = held.sum(dim=1)  # exemplars of each class
        begin, by_class = number.cumsum(0) - number, self.buffer.targets.argsort(stable=True)
        available = (number > 0) & (self.prototypes.abs().sum(dim=1) > 0)
        found = (place < ends[-1]) & available.any()
        slots = []
        for side in (0, 1):
            wanted = pairs[side][index]
            other, inside = torch.rand((2, len(spare)), generator=rng, device=device, dtype=torch.float64)
            instead = torch.searchsorted(available.cumsum(0), (other * available.sum()).long() + 1)
            label = torch.where(available[wanted], wanted, instead.clamp(max=num_classes - 1))
            at = begin[label] + (inside * number[label]).long()
            slots.append(torch.where(found, by_class[at.clamp(max=len(by_class) - 1)], spare))
        alpha = torch.full((2, len(spare)), config.mixup_alpha, dtype=torch.float64, device=device)
        gamma = torch._standard_gamma(alpha, generator=rng).clamp(min=1e-300)
        share = torch.where(found & (draws[1][index] <= config.mixup_p), gamma[0] / gamma.sum(dim=0), 0)
        return self.buffer.take(slots[0]), self.buffer.take(slots[1]), share.float()

    def _read(self, held: Exemplars) -> Tensor:
        return self.setting.read(held.rows, held.domain, "raw")

    def _random(self, images: Tensor, what: str, step: int) -> Tensor:
        """T of each image."""
        return self._view(images, self.setting.rng(f"view-{what}", step))

    def _pair(self, images: Tensor | None, step: int) -> Tensor | None:
        return None if images is None else torch.cat([images, self._random(images, "prototypes", step)])

    # -- learning ----------------------------------------------------------------------------------------------------
    def update(self, inputs: Inputs) -> Mapping[str, Tensor]:
        config, num_classes = self.config, self.setting.num_classes
        self.optimizer.zero_grad()
        images, targets = inputs.stream, inputs.targets
        if inputs.replay is not None:
            images = torch.cat([images, inputs.replay])
        features, projected = self._embed(images)
        cut = len(inputs.stream)
        weight = 1.0 if inputs.replay is None else config.ins_weight
        labels = torch.cat([targets + num_classes * v for v in range(config.variants)])
        similarity = weight * self._similarity(features[:cut], projected[:cut], inputs.offsets[:1])
        instances = instance_loss(similarity, labels, config.ins_temperature, plain=False)
        if inputs.replay is not None and inputs.labels is not None:
            similarity = weight * self._similarity(features[cut:], projected[cut:], inputs.offsets[1:])
            instances = instances + instance_loss(similarity, inputs.labels, config.ins_temperature, plain=True)
        views = projected[: len(targets)], projected[cut // 2 : cut // 2 + len(targets)]
        prototypes, _, _ = ope_loss(*views, targets, num_classes, config.proto_temperature)
        if inputs.prototypes is not None and inputs.prototype_targets is not None:
            _, replayed = self._embed(inputs.prototypes)
            one, two = replayed.chunk(2)
            seen, one, two = ope_loss(one, two, inputs.prototype_targets, num_classes, config.proto_temperature)
            prototypes = prototypes + seen
            self.prototypes.copy_((one + two).detach() / 2)
        own = inputs.classified
        logits = self.classifier(self.backbone(own.images))
        classified = mixed_cross_entropy(logits.float(), own.first, own.second, own.share)
        (classified + instances + prototypes).backward()
        self.optimizer.step()
        return {
            "classified_loss": classified.detach(),
            "instance_loss": instances.detach(),
            "prototype_loss": prototypes.detach(),
        }

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (m, D) and projections (m, P), all of length 1."""
        features = self.backbone(images)
        return F.normalize(features.float(), dim=1), F.normalize(self.projection(features).float(), dim=1)

    def _similarity(self, features: Tensor, projected: Tensor, offset: Tensor) -> Tensor:
        """P F_r^T + P P^T, F_r: columns of the features from `offset` (1,) on."""
        part = features.index_select(1, offset + torch.arange(self._slice, device=offset.device))
        with torch.autocast(features.device.type, enabled=False):  # similarities over a small temperature
            return projected @ part.T + projected @ projected.T

    def keep(self, batch: Batch) -> None:
        if batch.last_update and batch.epoch == 0:
            self.buffer.add(batch.rows, batch.targets, self.setting.rng("reservoir", batch.at.step), batch.domain)

    # -- answers -----------------------------------------------------------------------------------------------------
    def classify(self, features: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        out: Tensor = self.classifier(features)
        return out

    def head(self, task: int | None) -> Head:
        return Head("linear", self.classifier.weight, self.classifier.bias)

    def memory_bytes(self) -> dict[str, int]:
        return {"buffer": self.buffer.num_bytes(self.setting.image_bytes), "prototypes": self.prototypes.nbytes}


def blend(first: Tensor, second: Tensor, own: Tensor, other: Tensor, share: Tensor) -> Mix:
    """(1 - share) of the first images (m, C, S, S) and share (m,) of the second, with both targets (m,)."""
    part = share[:, None, None, None]
    return Mix((1 - part) * first + part * second, own, other, share)


METHOD = OnPro
