"""The reader: rows of a store, seen through a domain and a view, as float images. All that ever touches pixels."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from clbench.data.store import ImageStore
from clbench.data.views import View, parse_view
from clbench.errors import InputError, unknown_name

__all__ = ["Reader"]

FEATURES, RAW = "features", "raw"


class Domains(Protocol):
    """`clbench.scenarios.model.Domains`: pixel p of the image shown is pixel `table[d, p]` of the stored one."""

    @property
    def kind(self) -> str: ...
    @property
    def table(self) -> Tensor: ...


class Reader:
    """`reader(rows, domain, view, rng)`: (B,) int64 rows -> (B, C, h, w) float32 images on the store's device.

    A pure function of its arguments: nothing is kept between calls and nothing is read back to the host.

    views: name -> pipeline text (`clbench.data.views`); must have `test`. The name `raw` is the test view unless given.
    domains: the scenario's pixel permutations, applied to the stored image before the view; None if it has none.
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
        self.permutations: Tensor | None = None
        if domains is not None:
            if domains.kind != "permutation":
                raise unknown_name("kind of domain", domains.kind, ["permutation"])
            pixels = store.image_shape[1] * store.image_shape[2]
            if domains.table.ndim != 2 or domains.table.shape[1] != pixels:
                raise InputError(
                    f"the scenario permutes {domains.table.shape[-1]} pixels, "
                    f"but the images of {store.name} have {pixels}: build it for this data set"
                )
            self.permutations = domains.table.to(store.device)

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
        if domain is not None and self.permutations is not None:
            source = self.permutations.index_select(0, domain)[:, None].expand(-1, images.shape[1], -1)
            images = images.flatten(2).gather(2, source).view_as(images)
        return self._view(view)(images, rng)
