"""The reader: rows of a store, seen through a domain and a view, as float images. All that ever touches pixels."""

import math
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.data.store import ImageStore
from clbench.data.views import View, parse_view
from clbench.errors import InputError, unknown_name

__all__ = ["Reader"]

FEATURES, RAW = "features", "raw"


class Domains(Protocol):
    """`clbench.scenarios.model.Domains`, which says what each kind means."""

    @property
    def kind(self) -> str: ...
    @property
    def table(self) -> Tensor: ...


class Reader:
    """`reader(rows, domain, view, rng)`: (B,) int64 rows -> (B, C, h, w) float32 images on the store's device.

    A pure function of its arguments: nothing is kept between calls and nothing is read back to the host.

    views: name -> pipeline text (`clbench.data.views`); must have `test`. The name `raw` is the test view unless given.
    domains: the scenario's permutations, rotations or overlays, applied to the stored image before the view, or None.
    features: set by whoever caches the features of a frozen backbone; answers the view name `features`,
        (rows, domain) -> (B, D).

    Raises InputError for a pipeline that cannot be read or does not fit the store's images.
    """

    def __init__(self, store: ImageStore, views: Mapping[str, str], domains: Domains | None = None) -> None:
        self.store = store
        self.views = {name: parse_view(text) for name, text in views.items()}
        if "test" not in self.views:
            raise InputError(f"a reader needs a view named 'test'; it was given {', '.join(views) or 'none'}")
        self.views.setdefault(RAW, self.views["test"])
        for view in self.views.values():
            view.output_shape(store.image_shape)
        self.features: Callable[[Tensor, Tensor | None], Tensor] | None = None
        self.domains = None if domains is None else checked(domains, store)
        self.table = None if domains is None else domains.table.to(store.device)

    def output_shape(self, view: str = "train") -> tuple[int, int, int]:
        """(C, h, w) of the images under a view."""
        return self._view(view).output_shape(self.store.image_shape)

    def _view(self, name: str) -> View:
        try:
            return self.views[name]
        except KeyError:
            raise unknown_name("view", name, [*self.views, FEATURES]) from None

    def __call__(
        self,
        rows: Tensor,
        domain: Tensor | None = None,
        view: str = "train",
        rng: torch.Generator | None = None,
    ) -> Tensor:
        """rows: (B,) int64 on the store's device. domain: (B,) int64 index into the scenario's domains, or None for the
        stored image. rng: a generator on the store's device, needed if the view is random."""
        if view == FEATURES:
            if self.features is None:
                raise InputError("view 'features' needs a frozen backbone whose features are cached; none is attached")
            return self.features(rows, domain)
        images = self.store.images.index_select(0, rows)
        if domain is not None and self.domains is not None and self.table is not None:
            images = CHANGES[self.domains.kind](images, self.table.index_select(0, domain))
        return self._view(view)(images, rng)


def permute(images: Tensor, source: Tensor) -> Tensor:
    """Pixel p becomes pixel `source[b, p]`. images: (B, C, H, W) uint8; source: (B, H*W) int64."""
    return images.flatten(2).gather(2, source[:, None].expand(-1, images.shape[1], -1)).view_as(images)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn anticlockwise by degrees (B, 1), bilinear, 0 outside; whole turns give the image back exactly."""
    angle = degrees[:, 0].double() * (math.pi / 180)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    height, width = images.shape[2:]
    # grid coordinates run from -1 to 1 along both sides, so a turn of an oblong image needs the ratio of its sides
    matrix = torch.stack([cos, -sin * (height / width), zero, sin * (width / height), cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    turned = F.grid_sample(images.double(), grid, align_corners=False)
    return turned.round().clamp(0, 255).to(torch.uint8)


def overlay(images: Tensor, values: Tensor) -> Tensor:
    """Set pixels to values (B, H*W) int64 in 0..255, in every channel; -1 leaves them."""
    laid = values.view(-1, 1, *images.shape[2:])
    return torch.where(laid < 0, images, laid.to(torch.uint8))


CHANGES = {"permutation": permute, "rotation": rotate, "overlay": overlay}


def checked(domains: Domains, store: ImageStore) -> Domains:
    """`domains`, if its table fits the store's images and holds what its kind says; InputError otherwise."""
    if domains.kind not in CHANGES:
        raise unknown_name("kind of domain", domains.kind, list(CHANGES))
    wanted = 1 if domains.kind == "rotation" else store.image_shape[1] * store.image_shape[2]
    if domains.table.ndim != 2 or domains.table.shape[1] != wanted:
        raise InputError(
            f"the scenario changes images of {domains.table.shape[-1]} pixels, but those of {store.name} have "
            f"{wanted}: build it for this data set"
        )
    if domains.table.dtype != torch.int64:
        raise InputError(f"the scenario's table of domains must be int64, not {domains.table.dtype}")
    if domains.kind != "rotation":
        low, high = (0, wanted - 1) if domains.kind == "permutation" else (-1, 255)
        if not bool(((domains.table >= low) & (domains.table <= high)).all()):
            raise InputError(f"the scenario's {domains.kind} table must hold numbers from {low} to {high} only")
    return domains
