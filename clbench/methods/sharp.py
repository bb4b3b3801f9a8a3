"""SHARP: units grow old and freeze; recent hidden activations are replayed; nearest neighbours answer.

Idea: a sparse network in which each episode (task) is learned by units of its own. Units that the episode's images make
active learn; units that do not are plastic, and whatever flows from them into others is cut. What has been learned is
kept in place by replaying early activations of the `recent_episodes` last episodes, stored with 8 bits; behind that the
units and all their inputs are frozen for good. There is no softmax: training is supervised contrastive; answers come
from a few vectors per class, compared on the units that knew it. No task id at test; boundaries must be known while
training. A class can't be answered before its first episode ends.

Paper: Gurbuz, Moorman, Dovrolis: SHARP, arXiv 2305.18563. Official code: BurakGurbuz97/SHARP-Continual-Learning at
12ff94c. Spec: card `sharp`, which is what that code does.

An episode is cut into phases of `phase_epochs` epochs, as many as the run's epochs make (30 are 10 phases of 3):

1. `select`: activity of all units on the first 1024 images; then learners are chosen, connections dropped and grown.
2. `train`: SupCon on the batch and on replayed activations, with a new Adadelta per phase.

Behind the last one: ages rise, activations are stored, plastic units are drawn anew, class vectors are written.

Same as the official code: all of the card's section 2, tau(2) for phases 1 and 2 included. Different, with the same
result: weights of absent connections are kept at 0 and their gradient is masked, once per step, in place of masking the
weights in each forward pass; singleton classes of a batch are taken out of the loss by a mask; stored vectors are kept
normalised, on their own units alone. Different where the official code gives NaN: an anchor without a partner is left
out of the mean, and a class whose activations are all equal is stored as such. Vectors of replayed classes come from
the first stored activations, not from drawn ones. Only activations that will be replayed again are kept.
A class with fewer images than `stm_per_class` or `ltm_per_class` gives those it has, and is replayed with replacement.

Shapes: B batch, C classes of the scenario, D penultimate units, U units of a layer, V its sources.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones.sharp_networks import StagedNetwork
from clbench.errors import InputError
from clbench.methods._activations import ActivationMemory
from clbench.methods._class_vectors import ClassVectors
from clbench.methods._sparse import drop, grow, most_active, promote, redraw_std, select, source_ages
from clbench.methods.base import Method, Setting, hp
from clbench.scenarios.model import Task
from clbench.stream.types import Batch, Cursor, Phase

__all__ = [
    "METHOD",
    "SHARP",
    "SHARPConfig",
    "age_mask",
    "has_partner",
    "phase_lengths",
    "replayed_episodes",
    "selection_percent",
    "supcon_loss",
    "tau",
]

SELECTION_IMAGES = 1024  # images of an episode that decide which units learn
CHUNK = 256  # images of one forward pass without gradients; has no influence on the result
INPUT_AGE, PRETRAINED_AGE = 99, 100  # never plastic
TINY = 1e-30  # below any sum of exponentials of cosines


@dataclass(frozen=True)
class SHARPConfig:
    """Defaults are the published ones for MNIST (card, section 3, raw replay)."""

    lr: float = hp(
        1.0, "learning rate of Adadelta", low=0.0, high=10.0, scale="log", source="official scripts",
        tune={"low": 0.1, "high": 2.0},
    )  # fmt: skip
    lr_decay: float = hp(1.0, "factor on the rate from phase to phase", low=0.0, high=1.0, source="official scripts")
    weight_decay: float = hp(
        0.0, "weight of the sum of squared weights and biases in the loss", low=0.0, high=1.0, source="official scripts"
    )
    temperature: float = hp(
        0.1, "temperature of the contrastive loss", low=1e-3, high=10.0, scale="log", source="official scripts",
        tune={"low": 0.03, "high": 0.5},
    )  # fmt: skip
    phase_epochs: int = hp(3, "epochs between two selections of units", low=1, unit="epochs", source="official scripts")
    min_activation: float = hp(
        90.0, "least share of a layer's activity that the learning units have together", low=1.0, high=100.0,
        unit="percent", source="official scripts: 40 to 90", tune={"choices": [60.0, 70.0, 80.0, 90.0]},
    )  # fmt: skip
    tau_period: float = hp(30.0, "phases in which that share would fall to 0", low=2.0, source="official scripts")
    sparsity: float = hp(
        0.6, "share of connections that are absent, in all layers but the first", low=0.0, high=1.0,
        source="official scripts",
    )  # fmt: skip
    recent_episodes: int = hp(
        1, "episodes whose activations are kept and replayed (`stm_num_tasks`); units freeze so much later", low=0,
        unit="episodes", source="official scripts",
    )  # fmt: skip
    stm_per_class: int = hp(25, "activations stored per class", low=1, unit="images", source="official scripts")
    replay_batch_size: int = hp(
        0, "activations replayed per step; 0 for as many as the batch has images", low=0, source="official scripts"
    )
    ltm_per_class: int = hp(25, "vectors stored per class", low=1, unit="images", source="official scripts")
    neighbours: int = hp(5, "nearest vectors that vote (`ltm_k_nearest`)", low=1, source="official scripts")
    reinit: bool = hp(True, "draw the weights of plastic units anew behind each episode", source="official scripts")
    pretrained_early: bool = hp(
        False, "take the early convolutions from --weights and never change them; the rest starts afresh",
        source="official activation-replay scripts",
    )  # fmt: skip


# -- learning an episode ---------------------------------------------------------------------------------------------
def phase_lengths(epochs: int, phase_epochs: int) -> list[int]:
    """Epochs of each phase of an episode; the last phase may be shorter."""
    full, rest = divmod(epochs, phase_epochs)
    return [phase_epochs] * full + ([rest] if rest else [])


def tau(t: float, period: float) -> float:
    """`(1 + cos(pi t / period)) / 2`."""
    return 0.5 * (1 + math.cos(math.pi * t / period))


def selection_percent(phase: int, period: float, minimum: float) -> float:
    """Share of a layer's activity that its learners need in phase 1, 2, ...: phases 1 and 2 both use tau(2)."""
    return max(100 * tau(max(phase, 2), period), minimum)


def has_partner(labels: Tensor) -> Tensor:
    """(B,) -> (B,) bool: whether another sample of the batch is of the same class."""
    return (labels[:, None] == labels[None, :]).sum(1) > 1


def supcon_loss(features: Tensor, labels: Tensor, temperature: float, keep: Tensor | None = None) -> Tensor:
    """Supervised contrastive loss of one view: mean over anchors of `-mean_{j in P} [s_j - log sum_{k != i} exp s_k]`.

    s: cosines over the temperature; P: other samples of the anchor's class; an anchor with none is left out.
    features: (B, D), not normalised; labels: (B,); keep: (B,) bool, False for samples that are not there at all.
    Returns a scalar, 0 without any pair. Source: card, section 2, step c.
    """
    unit = F.normalize(features, dim=1)
    scores = unit @ unit.T / temperature
    scores = scores - scores.detach().amax(1, keepdim=True)
    others = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    if keep is not None:
        others = others & keep[None, :] & keep[:, None]
    partners = others & (labels[:, None] == labels[None, :])
    num_partners = partners.sum(1)
    log_total = (scores.exp() * others).sum(1).clamp(min=TINY).log()
    per_anchor = log_total - (scores * partners).sum(1) / num_partners.clamp(min=1)
    anchors = num_partners > 0
    return (per_anchor * anchors).sum() / anchors.sum().clamp(min=1)


# -- end of an episode -----------------------------------------------------------------------------------------------
def age_mask(ages: Tensor, at_least: int) -> Tensor:
    """(D,) bool, units of that age or older; all units where there are none."""
    old = ages >= at_least
    return old | ~old.any()


def replayed_episodes(episode: int, recent: int) -> list[int]:
    """Episodes (from 0) that are replayed while learning `episode`: the `recent` ones before it, oldest first."""
    return list(range(max(episode - recent, 0), episode))


class SHARP(Method):
    """See the module. `ages[0]` are those of the input channels, `ages[i + 1]` and `masks[i]` those of layer i."""

    Config = SHARPConfig
    settings = frozenset({"class", "task"})
    small_backbone = "mnistlike"
    config: SHARPConfig

    def __init__(self, config: SHARPConfig, backbone: nn.Module, setting: Setting) -> None:
        super().__init__(config, backbone, setting)
        if setting.online:
            raise InputError(
                f"sharp reads each task several times, but scenario {setting.scenario_id} is online: choose one with "
                f"epochs"
            )
        network, device = self.network, setting.device
        weights = [layer.weight for layer in network.unit_layers]
        self.ages = [torch.full((weights[0].shape[1],), INPUT_AGE, device=device)]
        self.ages += [torch.zeros(weight.shape[0], dtype=torch.int64, device=device) for weight in weights]
        if config.pretrained_early:
            self._start_from_pretrained()
        self.masks = [self._initial_mask(index, weight) for index, weight in enumerate(weights)]
        self.memory = ActivationMemory(config.stm_per_class, network.activation_shape, device)
        self.vectors = ClassVectors(setting.num_classes, device)
        self.activity: list[Tensor] = []  # of each layer's units, from the step of a selection to its end
        self.optimizer: torch.optim.Adadelta | None = None
        self._gates: list[tuple[nn.Parameter, Tensor]] = []
        self._awake = self.ages[-1]
        self._follow()

    # -- what to run -------------------------------------------------------------------------------------------------
    def phases(self, task: Task, index: int) -> Sequence[Phase]:
        selection = Phase(
            "select", epochs=1, batch_size=SELECTION_IMAGES, first=SELECTION_IMAGES, order="listed", view=self.view,
            updates=1, drop_last=False,
        )  # fmt: skip
        phases = []
        for epochs in phase_lengths(self.setting.epochs, self.config.phase_epochs):
            phases += [selection, Phase("train", epochs=epochs, drop_last=True)]
        return phases

    def open_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        if phase.name == "train":
            learned = [p for p in self.network.parameters() if p.requires_grad]
            rate = self.config.lr * self.config.lr_decay ** (at.phase // 2)
            self.optimizer = torch.optim.Adadelta(learned, lr=rate)

    def step(self, batch: Batch) -> Mapping[str, Tensor]:
        if batch.phase.name == "select":
            self.activity = self._activity(batch.images)
            return {}
        return self._train(batch)

    def end_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
        if phase.name == "select":
            self._choose_learners(at)
            self._rewire(at)
            return
        self.optimizer = None
        if at.phase + 1 == len(self.phases(task, at.task)):
            self._end_episode(task, at.task)

    # -- select, drop, grow ------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _activity(self, images: Tensor) -> list[Tensor]:
        parts = [self.network.activity(part) for part in images.split(CHUNK)]
        return [torch.stack(layer).sum(0) for layer in zip(*parts, strict=True)]

    def _choose_learners(self, at: Cursor) -> None:
        percent = selection_percent(at.phase // 2 + 1, self.config.tau_period, self.config.min_activation)
        for index, activity in enumerate(self.activity):
            self.ages[index + 1] = select(self.ages[index + 1], most_active(activity, percent))
        self.activity = []

    def _rewire(self, at: Cursor) -> None:
        """Cut what flows from plastic units into others; as many connections grow into plastic units."""
        for index, layer in enumerate(self.network.unit_layers):
            sources = source_ages(self.ages[index], self.network.inputs_per_unit[index])
            targets, area = self.ages[index + 1], layer.weight[0, 0].numel()
            dropped = drop(self.masks[index], sources, targets)
            rng = self.setting.rng("sharp-grow", at.task, at.phase, index)
            quota = int(dropped.sum()) * area
            self.masks[index], _ = grow(self.masks[index] & ~dropped, targets, quota, area, rng)
        self._follow()

    # -- train -------------------------------------------------------------------------------------------------------
    def _train(self, batch: Batch) -> Mapping[str, Tensor]:
        hidden, labels = self.network.early(batch.images), batch.targets
        keep = has_partner(labels)
        if len(self.memory) > 0:
            num = self.config.replay_batch_size or len(labels)
            replayed, replayed_labels = self.memory.draw(num, self.setting.rng("sharp-replay", batch.at.step))
            hidden, labels = torch.cat([hidden, replayed]), torch.cat([labels, replayed_labels])
            keep = torch.cat([keep, torch.ones_like(replayed_labels, dtype=torch.bool)])
        features = self._from_early(hidden)
        with torch.autocast(features.device.type, enabled=False):
            loss = supcon_loss(features.float(), labels, self.config.temperature, keep)
            if self.config.weight_decay > 0:
                squares = [parameter.square().sum() for parameter in self.network.parameters()]
                loss = loss + self.config.weight_decay * torch.stack(squares).sum()
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        loss.backward()
        for parameter, gate in self._gates:
            if parameter.grad is not None:  # none in a pretrained early block
                parameter.grad.mul_(gate)
        self.optimizer.step()  # Adadelta leaves what never had a gradient as it is, to the bit
        return {"loss": loss.detach()}

    # -- end of an episode -------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _end_episode(self, task: Task, episode: int) -> None:
        config, memory, network = self.config, self.memory, self.network
        replayed = list(zip(memory.labels.tolist(), memory.episodes.tolist(), strict=True))
        classes = task.targets.unique().tolist()
        self.ages[1:] = [promote(ages) for ages in self.ages[1:]]
        self._follow()
        for label in classes:
            memory.store(label, episode, network.early(self._images(task, label, config.stm_per_class)))
        if config.reinit:
            self._redraw_plastic(episode)
        hidden = [network.early(self._images(task, label, config.ltm_per_class)) for label in classes]
        self._write_vectors(classes, hidden, at_least=2)
        for learned in replayed_episodes(episode, config.recent_episodes):  # a class that has come again is among both
            labels = [label for label, of in replayed if of == learned]
            hidden = [memory.of_class(label)[: config.ltm_per_class] for label in labels]
            self._write_vectors(labels, hidden, at_least=3 + episode - 1 - learned)
        memory.keep(replayed_episodes(episode + 1, config.recent_episodes))

    def _redraw_plastic(self, episode: int) -> None:
        for index, layer in enumerate(self.network.unit_layers):
            rows = (self.ages[index + 1] == 0).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            rng = self.setting.rng("sharp-redraw", episode, index)
            drawn = torch.randn((len(rows), *layer.weight.shape[1:]), generator=rng, device=rows.device)
            layer.weight[rows] = drawn * redraw_std(len(rows), layer.weight[0, 0].numel())
            layer.bias[rows] = 0
        self._follow()

    def _write_vectors(self, labels: Sequence[int], hidden: Sequence[Tensor], at_least: int) -> None:
        """Keep the penultimate vectors of (k, *activation_shape) activations of each class, on units of that age."""
        if labels:
            vectors = [self._from_early(own) for own in hidden]
            self.vectors.store(vectors, labels, age_mask(self.ages[-1], at_least))

    # -- answers -----------------------------------------------------------------------------------------------------
    def features(self, images: Tensor, task: int | None) -> Tensor:
        """(B, C, H, W) -> (B, D) penultimate activations, 0 for plastic units."""
        return self._from_early(self.network.early(images))

    def classify(self, features: Tensor, allowed: Tensor, task: int | None) -> Tensor:
        """(B, C) votes; all 0 until vectors of an allowed class are stored."""
        with torch.autocast(features.device.type, enabled=False):
            return self.vectors.votes(features.float(), allowed, self.config.neighbours)

    def memory_bytes(self) -> dict[str, int]:
        return {
            "activation_memory": self.memory.num_bytes(),
            "class_vectors": self.vectors.num_bytes(),
            "connection_masks": sum(mask.nbytes for mask in self.masks),
            "unit_ages": sum(ages.nbytes for ages in self.ages),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for name in ("ages", "masks", "activity"):  # a checkpoint is read to the host
            setattr(self, name, [value.to(self.setting.device) for value in getattr(self, name)])
        self._follow()

    # -- inside ------------------------------------------------------------------------------------------------------
    @property
    def network(self) -> StagedNetwork:
        """The network in stages inside the backbone. Raises InputError if it is of another kind."""
        net = getattr(self.backbone, "net", self.backbone)
        if not isinstance(net, StagedNetwork):
            name = getattr(self.backbone, "name", type(net).__name__)
            raise InputError(
                f"sharp needs a network whose layers it can mask and that it can enter behind the early convolutions, "
                f"which backbone {name} is not: give --backbone mnistlike or --backbone vgg-small"
            )
        return net

    def _from_early(self, hidden: Tensor) -> Tensor:
        """(B, *activation_shape) -> (B, D); nothing flows through plastic units, nor back."""
        return self.network.from_early(hidden) * self._awake

    @torch.no_grad()
    def _follow(self) -> None:
        """Bring weights and gates into line with ages and masks: weights of absent connections are 0, and gradients of
        those and of frozen units will be."""
        self._gates = []
        for index, (layer, mask) in enumerate(zip(self.network.unit_layers, self.masks, strict=True)):
            last = 1 if index < self.network.num_early else self.config.recent_episodes + 1
            moves = self.ages[index + 1] <= last
            kernel = [1] * (layer.weight.ndim - 2)
            layer.weight.mul_(mask.view(*mask.shape, *kernel))
            gate = torch.empty_like(layer.weight).copy_((mask & moves[:, None]).view(*mask.shape, *kernel))
            self._gates += [(layer.weight, gate), (layer.bias, moves.to(layer.bias.dtype))]
        self._awake = (self.ages[-1] != 0).float()

    def _images(self, task: Task, label: int, num: int) -> Tensor:
        """The first `num` training images of a class, without augmentation."""
        chosen, device = (task.targets == label).nonzero()[:num, 0], self.setting.device
        domain = None if task.domain is None else task.domain[chosen].to(device)
        return self.setting.read(task.rows[chosen].to(device), domain, self.view)

    def _initial_mask(self, index: int, weight: Tensor) -> Tensor:
        """(U, V) bool. The first layer, and a pretrained early block, are dense."""
        shape, device = weight.shape[:2], self.setting.device
        if index == 0 or (self.config.pretrained_early and index < self.network.num_early):
            return torch.ones(shape, dtype=torch.bool, device=device)
        rng = self.setting.rng("sharp-mask", index)
        mask = torch.rand(shape, generator=rng, device=device) >= self.config.sparsity
        if not bool(mask.any()):
            raise InputError(
                f"sparsity={self.config.sparsity} leaves layer {index + 1} of sharp's network, {shape[0]} units with "
                f"{shape[1]} sources each, without any connection: lower it (published: 0.6)"
            )
        return mask

    @torch.no_grad()
    def _start_from_pretrained(self) -> None:
        """Fix the early block. The other layers are drawn anew, as a file of weights holds them too."""
        if not getattr(self.backbone, "pretrained_on", ()):
            raise InputError(
                "pretrained_early=true needs a trained network: give --weights FILE (and --backbone-set "
                "pretrained_on=TAG, what it was trained on)"
            )
        for index, layer in enumerate(self.network.unit_layers):
            if index < self.network.num_early:
                layer.requires_grad_(False)
                self.ages[index + 1].fill_(PRETRAINED_AGE)
            else:
                nn.init.kaiming_normal_(
                    layer.weight, nonlinearity="relu", generator=self.setting.rng("sharp-init", index)
                )
                nn.init.zeros_(layer.bias)


METHOD = SHARP
