"""The built-in backbones and the models with a text tower, as tables that can be read without torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CLIP", "EMBEDDED", "Embedded", "is_clip", "list_backbones"]


@dataclass(frozen=True)
class Embedded:
    """A backbone that needs no weights file.

    features: width of the features and for which images. parameters: their number, for 3 x 32 x 32 images unless said.
    options: what `--backbone-set` may change, with its default; a tuple lists the valid words, default first.
    """

    title: str
    features: str
    parameters: str
    source: str
    options: Mapping[str, int | tuple[str, ...]] = field(default_factory=dict)


EMBEDDED: Mapping[str, Embedded] = {
    "flatten": Embedded(
        title="the pixels themselves, no parameters",
        features="C * H * W",
        parameters="0",
        source="-",
    ),
    "mlp": Embedded(
        title="fully connected 400-400 with ReLU, for digits and MNIST",
        features="400",
        parameters="474,400 for 1 x 28 x 28",
        source="stability_gap card, section 2 (MLP 784-400-400)",
        options={"width": 400, "depth": 2},
    ),
    "mlp-300-100": Embedded(
        title="fully connected 300-100 with ReLU and without biases, for supermasks on MNIST",
        features="100",
        parameters="951,600 (265,200 for 1 x 28 x 28)",
        source="exssnet card, section 1 (MLP 784-300-100)",
    ),
    "reduced-resnet18": Embedded(
        title="reduced ResNet-18 of online continual learning (20 channels)",
        features="160 at 32 px, 640 at 64 and 84 px",
        parameters="1,093,140",
        source="online_baselines card, section 1 (families A, B); pool=global: stability_gap card",
        options={"nf": 20, "pool": ("avg4", "global")},
    ),
    "resnet18-cifar": Embedded(
        title="ResNet-18 without max-pool for small images (64 channels)",
        features="512 at any size",
        parameters="11,168,832",
        source="online_baselines card, section 1 (family C)",
        options={"nf": 64, "pool": ("global", "avg4")},
    ),
    "vit-tiny-32": Embedded(
        title="small vision transformer with 4 px patches",
        features="192",
        parameters="2,691,648",
        source="clbench; block as in timm's VisionTransformer, width and heads as DeiT-Ti, 6 blocks",
        options={"patch": 4, "width": 192, "depth": 6, "heads": 3},
    ),
    "mnistlike": Embedded(
        title="SHARP's network for MNIST and the like: two convolutions, two linear layers",
        features="500",
        parameters="765,768 (645,480 for 1 x 28 x 28)",
        source="sharp card, section 1 (MNISTLIKE)",
        options={"width": 500},
    ),
    "vgg-small": Embedded(
        title="SHARP's network for CIFAR: seven convolutions, two linear layers",
        features="1024",
        parameters="3,629,376",
        source="sharp card, section 1 (VGG_Small; width=2048: VGG_Small_Double)",
        options={"width": 1024},
    ),
}


# With a text tower, for methods that compare images with texts (`clip_source.py`).
CLIP: Mapping[str, Embedded] = {
    "clip-small": Embedded(
        title="small CLIP for 64 px images, trained by this project (assets/clip-small.md)",
        features="192",
        parameters="3,979,585",
        source="clbench; `clbench pretrain clip-small`",
        options={
            "pretrained": ("true", "false"),
            "grad_checkpointing": ("false", "true"),
            "micro_batch": 0,
            "micro_texts": 0,
        },
    ),
    "clip:MODEL.TAG": Embedded(
        title="models of open_clip: clip:ViT-B-16-quickgelu.openai, or clip:MODEL and --weights FILE",
        features="its embedding",
        parameters="its own",
        source="open_clip",
        options={
            "pretrained": ("true", "false"),
            "grad_checkpointing": ("false", "true"),
            "micro_batch": 0,
            "micro_texts": 0,
        },
    ),
}


def is_clip(name: str) -> bool:
    """Whether a backbone of this name has a text tower."""
    return name == "clip-small" or name.startswith("clip:")


def list_backbones() -> list[dict[str, Any]]:
    """One record per built-in backbone: name, title, features, parameters, options, source. Any timm name works too,
    and any model of open_clip's behind `clip:`."""
    return [
        {
            "name": name,
            "title": entry.title,
            "features": entry.features,
            "parameters": entry.parameters,
            "options": {key: value[0] if isinstance(value, tuple) else value for key, value in entry.options.items()},
            "source": entry.source,
        }
        for name, entry in (*EMBEDDED.items(), *CLIP.items())
    ]
