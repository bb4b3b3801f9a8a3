"""The image store: all images of a data set as uint8 rows on one device."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clbench.data.classes import ClassTable, LabelTable

__all__ = ["ImageStore"]


@dataclass(frozen=True)
class ImageStore:
    """N images in canonical row order: training rows, then test rows, each sorted by the sha256 of the (C, H, W) pixel
    bytes, then by label. The same data from any source gives the same rows.

    images: (N, C, H, W) uint8; memory-mapped as `load` gives it, resident after `to("cuda")`. Read only.
    labels: (N,) int64 finest class id. split: (N,) uint8, TRAIN or TEST.
    groups: (N,) int64 index into `group_names` (the domains of PACS), or None.
    mean, std: per channel in [0, 1]: the published ones of the catalogue, else measured on the training rows.
    images_of: the image collections these images come from; a backbone that was trained on one of them is contaminated.
    fingerprint: sha256 over images, labels and split in row order, hex.
    """

    images: Tensor
    labels: Tensor
    split: Tensor
    classes: ClassTable
    name: str
    fingerprint: str
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    images_of: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the stored images."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        return self.images.device

    def table(self) -> LabelTable:
        """What a scenario builder gets: everything but the pixels, on the CPU."""
        return LabelTable(
            dataset=self.name,
            labels=self.labels.cpu(),
            split=self.split.cpu(),
            classes=self.classes,
            fingerprint=self.fingerprint,
            groups=None if self.groups is None else self.groups.cpu(),
            group_names=self.group_names,
        )

    def to(self, device: torch.device | str) -> "ImageStore":
        """The same store with all tensors on `device` (itself if they are there already)."""
        device = torch.device(device)
        if self.images.device == device or (device.index is None and self.images.device.type == device.type):
            return self
        return replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            split=self.split.to(device),
            groups=None if self.groups is None else self.groups.to(device),
        )
