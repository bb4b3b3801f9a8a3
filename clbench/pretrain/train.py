"""The training loop of clip-small.

Each step draws images of all training domains, each domain its share, and one caption for every class that is there
(`captions.step_texts`). The loss is the cross entropy of scaled cosines between an image and the captions, half of it
over the captions of all domains, half over those of its own. So it is CLIP's loss in one direction, with all captions
as negatives in place of those of a batch. Everything drawn depends on the seed and the step alone.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clbench import data
from clbench.atomic import atomic_write_bytes
from clbench.backbones.clip_model import ClipBackbone
from clbench.data.store import ImageStore
from clbench.errors import InputError, RunFailed
from clbench.pretrain.captions import ClassWords, Domain, class_words, domains, step_texts
from clbench.pretrain.images import augment, batch_sizes, recolour
from clbench.rng import derive_seed, generator

__all__ = ["Recipe", "Source", "open_sources", "train"]

SIZE = 64
LOG_EVERY = 100


@dataclass(frozen=True)
class Recipe:
    """steps of `batch` images; AdamW (0.9, 0.98) with decay on matrices and kernels; warm-up, then cosine to 0."""

    steps: int = 2600
    batch: int = 192
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    warm_up: int = 60
    label_smoothing: float = 0.1
    max_scale: float = 50.0
    seed: int = 0
    precision: str = "bf16"


@dataclass(frozen=True)
class Source:
    """A training domain with its images: rows (n,) of the store, labels (n,) class ids."""

    domain: Domain
    store: ImageStore
    rows: Tensor
    labels: Tensor
    words: ClassWords

    @property
    def own_images(self) -> tuple[str, ...]:
        """The collection that these images are, the store's first: CIFAR-10 is a part of Tiny Images, not all."""
        return self.store.images_of[:1]


def open_sources(roots: Sequence[Path]) -> list[Source]:
    """The training domains, all their rows. Raises InputError if a data set is missing."""
    wanted = domains()
    names = list(dict.fromkeys(domain.dataset for domain in wanted))
    stores = dict(zip(names, data.load_all(names, roots=roots, size=SIZE, scenario="clip-small"), strict=True))
    out = []
    for domain in wanted:
        store = stores[domain.dataset]
        keep = torch.ones(len(store), dtype=torch.bool)
        if domain.groups:
            unknown = set(domain.groups) - set(store.group_names)
            if unknown or store.groups is None:
                raise InputError(
                    f"{domain.dataset} has no domain {', '.join(sorted(unknown))}; fetch the data set again"
                )
            keep = torch.isin(store.groups, torch.tensor([store.group_names.index(group) for group in domain.groups]))
        rows = keep.nonzero()[:, 0]
        labels = store.labels[rows]
        words = class_words(store.classes.names[: int(store.labels.max()) + 1])
        out.append(Source(domain, store, rows, labels, words))
    return out


def draw(sources: Sequence[Source], sizes: Sequence[int], rng: torch.Generator) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Images (B, 3, 64, 64) float32 after augmentation, which of them may be mirrored, and the labels per domain."""
    images, mirror, labels = [], [], []
    for source, size in zip(sources, sizes, strict=True):
        chosen = torch.randint(len(source.rows), (size,), generator=rng)
        pixels = source.store.images[source.rows[chosen]].float() / 255
        images.append(recolour(pixels, rng) if source.domain.grey else pixels.expand(-1, 3, -1, -1))
        mirror.append(torch.full((size,), not source.domain.grey))
        labels.append(source.labels[chosen])
    return torch.cat(images), torch.cat(mirror), labels


def contrast(images: Tensor, texts: Tensor, targets: Tensor, own: Tensor, scale: Tensor, smoothing: float) -> Tensor:
    """images (B, D), texts (T, D): features; targets (B,): the text of each image; own (B, T): texts of its domain.

    Mean of the cross entropies over all texts and over those of the domain.
    """
    logits = scale * F.normalize(images.float(), dim=1) @ F.normalize(texts.float(), dim=1).T
    everywhere = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    inside = logits.masked_fill(~own, -1e4).log_softmax(1)
    right = inside.gather(1, targets[:, None])[:, 0]
    spread = (inside * own).sum(1) / own.sum(1)
    within = -((1 - smoothing) * right + smoothing * spread).mean()
    return (everywhere + within) / 2


def rate(step: int, recipe: Recipe) -> float:
    if step < recipe.warm_up:
        return recipe.lr * (step + 1) / recipe.warm_up
    done = (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))


def optimiser(model: ClipBackbone, recipe: Recipe) -> torch.optim.AdamW:
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=recipe.lr, betas=(0.9, 0.98),
    )  # fmt: skip


def train(
    model: ClipBackbone,
    sources: Sequence[Source],
    recipe: Recipe,
    folder: Path,
    *,
    device: torch.device,
    checkpoint_every: int = 200,
    report: Callable[[str], None] = print,
) -> None:
    """Train `model` in place; goes on from `folder`/checkpoint.pt if that is of the same recipe, else starts.

    Raises InputError if the folder holds a run of another recipe, RunFailed if the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.train().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stub
    optimizer = optimiser(model, recipe)
    kept = folder / "checkpoint.pt"
    start = restore(kept, model, optimizer, recipe) if kept.exists() else 0
    sizes = batch_sizes([source.domain.share for source in sources], recipe.batch)
    log = folder / "log.jsonl"
    losses: list[Tensor] = []
    begun = time.perf_counter()
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, recipe)
        losses.append(update(model, optimizer, sources, sizes, recipe, step, device))
        done = step + 1
        if done % LOG_EVERY == 0 or done == recipe.steps:
            loss = float(torch.stack(losses).mean())
            if not math.isfinite(loss):
                raise RunFailed(f"the loss became {loss} before step {done}: lower the learning rate")
            speed = len(losses) * recipe.batch / (time.perf_counter() - begun)
            line = {
                "step": done,
                "loss": round(loss, 4),
                "lr": optimizer.param_groups[0]["lr"],
                "scale": round(float(model.log_scale.detach().exp()), 2),
                "images_per_s": round(speed, 1),
            }
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            report(f"step {done}/{recipe.steps}: loss {loss:.3f}, {speed:.0f} images/s")
            losses.clear()
            begun = time.perf_counter()
        if done % checkpoint_every == 0 or done == recipe.steps:
            save(kept, model, optimizer, recipe, done)


def update(
    model: ClipBackbone,
    optimizer: torch.optim.Optimizer,
    sources: Sequence[Source],
    sizes: Sequence[int],
    recipe: Recipe,
    step: int,
    device: torch.device,
) -> Tensor:
    """One step; returns its loss, detached."""
    images, mirror, labels = draw(sources, sizes, rng := generator(recipe.seed, "clip-small/images", step))
    images = augment(images, mirror, rng).to(device).contiguous(memory_format=torch.channels_last)
    random = np.random.default_rng(derive_seed(recipe.seed, "clip-small/texts", step))
    present = [set(label.tolist()) for label in labels]
    texts = step_texts([(source.domain, source.words) for source in sources], present, random)
    of_class = [torch.from_numpy(places) for places in texts.of_class]
    targets = torch.cat([places[label] for places, label in zip(of_class, labels, strict=True)])
    own = torch.zeros((len(sources), len(texts.texts)), dtype=torch.bool)
    for row, places in enumerate(of_class):
        own[row, places[places >= 0]] = True
    own = own.repeat_interleave(torch.tensor(sizes), 0)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        image_features = model(images)
        text_features = model.encode_text(model.tokenize(texts.texts).to(device))
    scale = model.log_scale.exp().clamp(max=recipe.max_scale)
    loss = contrast(
        image_features, text_features, targets.to(device), own.to(device), scale, recipe.label_smoothing
    )  # fmt: skip
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        model.log_scale.clamp_(0, math.log(recipe.max_scale))
    return loss.detach()


def save(path: Path, model: ClipBackbone, optimizer: torch.optim.Optimizer, recipe: Recipe, done: int) -> None:
    import io

    buffer = io.BytesIO()
    state = {
        "model": model.net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "recipe": asdict(recipe),
        "done": done,
    }
    torch.save(state, buffer)
    atomic_write_bytes(path, buffer.getvalue())


def restore(path: Path, model: ClipBackbone, optimizer: torch.optim.Optimizer, recipe: Recipe) -> int:
    """Load a checkpoint; returns the steps done."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state["recipe"] != asdict(recipe):
        raise InputError(
            f"{path.parent} holds a run with other settings ({state['recipe']}): give these, or another folder"
        )
    model.net.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["done"])
