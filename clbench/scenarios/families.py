"""The protocol families of the online literature: settings that are fixed together, and whose numbers never mix.

Source: `online_baselines` card, section 1. A preset names its family (`family = "A"` in presets/*.toml); its own fields
hold stream, order, batch and views, a method's recipe holds optimiser and replay batch.
"""

from dataclasses import dataclass

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True)
class Family:
    """title: what it is, in one line. backbone: the built-in one that all its numbers were made with."""

    title: str
    backbone: str


FAMILIES = {
    "A": Family(
        "RaptorMai, PCR, HPCR: reduced ResNet-18, SGD 0.1, batches 10 + 10, memory in total, seeded order, "
        "pixels in [0, 1]",
        "reduced-resnet18",
    ),
    "B": Family(
        "AML (ER-ACE): reduced ResNet-18, SGD, batches 10 + 10, memory per class, classes in order, pixels in [-1, 1]",
        "reduced-resnet18",
    ),
    "C": Family(
        "OCM, OnPro, CCL-DC: full ResNet-18 pooled over the whole map, Adam 5e-4, batches 10 + 64, memory in total, "
        "classes in order, normalised pixels",
        "resnet18-cifar",
    ),
}
