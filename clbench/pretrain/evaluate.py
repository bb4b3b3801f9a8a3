"""Zero-shot accuracy on whole data sets, each with its own prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clbench import data
from clbench.backbones.clip_model import ClipBackbone
from clbench.backbones.clip_text import encode, unit
from clbench.data.classes import TEST
from clbench.scenarios.prompts import class_texts, templates

__all__ = ["HELD_OUT", "ZeroShot", "zero_shot"]

# The domains of mtil-small, and one more set of digits: no image of theirs is trained on.
HELD_OUT = (
    "caltech101", "cifar100", "clothing", "digits", "dtd", "flowers5", "grocery-store", "gtsrb", "mnist-subset",
    "rsscn7", "sign-digits",
)  # fmt: skip
CHUNK = 250


@dataclass(frozen=True)
class ZeroShot:
    """accuracy: share of the test images whose best class is theirs. chance: 1 / classes."""

    dataset: str
    classes: int
    images: int
    accuracy: float

    @property
    def chance(self) -> float:
        return 1 / self.classes


@torch.inference_mode()
def zero_shot(
    model: ClipBackbone,
    datasets: Sequence[str] = HELD_OUT,
    *,
    roots: Sequence[Path] = (),
    device: torch.device,
    size: int = 64,
) -> list[ZeroShot]:
    """All test rows at size x size, classes by the mean of the unit text features of all templates, float32.

    Raises InputError if a data set is missing.
    """
    model.eval()
    out = []
    stores = data.load_all(datasets, roots=roots, size=size, scenario="zero-shot")
    for name, store in zip(datasets, stores, strict=True):
        rows = (store.split == TEST).nonzero()[:, 0]
        finest = int(store.labels.max()) + 1
        names = class_texts(name, store.classes.names[:finest], name)
        prompts = [[template.replace("{}", text) for text in names] for template in templates(name)]
        features = [unit(encode(model, model.tokenize(texts).to(device))) for texts in prompts]
        weights = unit(torch.stack(features).mean(0))
        right = 0
        for part in torch.split(rows, CHUNK):
            images = (store.images[part].float() / 255).expand(-1, 3, -1, -1).to(device)
            answer = (model(images.contiguous(memory_format=torch.channels_last)).float() @ weights.T).argmax(1)
            right += int((answer.cpu() == store.labels[part]).sum())
        out.append(ZeroShot(name, finest, len(rows), right / len(rows)))
    return out
