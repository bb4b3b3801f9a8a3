"""Rows of a store as a plain PyTorch data set: what every other framework can take."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from clbench.data.reader import CHANGES, checked
from clbench.data.store import ImageStore
from clbench.data.views import View, parse_view
from clbench.errors import InputError
from clbench.scenarios.model import Domains, Scenario

__all__ = ["RowDataset", "ViewTransform", "check_store", "data_fingerprint", "view_of"]


class RowDataset(Dataset[tuple[Tensor, int]]):
    """Some rows of a store, in the order given; a row that is listed twice comes twice.

    `dataset[i]` is ((C, H, W) uint8 image, target), the image as its domain shows it and before any view. It reads one
    row of the store and decodes nothing. Images stay on the store's device.

    rows, targets: (n,) int64. domain: (n,) int64 index into `domains`, or None for the stored images.
    """

    def __init__(
        self,
        store: ImageStore,
        rows: Tensor,
        targets: Tensor,
        domain: Tensor | None = None,
        domains: Domains | None = None,
    ) -> None:
        self.images = store.images
        self.rows: list[int] = rows.tolist()
        self.targets: list[int] = targets.tolist()
        self.domain: list[int] | None = None if domain is None or domains is None else domain.tolist()
        self.kind = "" if domains is None else domains.kind
        self.table = None if domains is None else checked(domains, store).table.to(store.device)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        if self.domain is None or self.table is None:
            return self.images[row].clone(), self.targets[index]
        at = self.domain[index]
        image = CHANGES[self.kind](self.images[row : row + 1], self.table[at : at + 1])[0]
        return image, self.targets[index]


@dataclass(frozen=True)
class ViewTransform:
    """A view as a transform of one image: (C, H, W) uint8 -> (C, h, w) float32.

    Random views draw from torch's global generator, as the transforms of other frameworks do: `torch.manual_seed` and
    the seeds of loader workers decide.
    """

    view: View

    def __call__(self, image: Tensor) -> Tensor:
        rng = torch.default_generator if self.view.random else None
        return self.view(image[None], rng)[0]


def view_of(text: str, store: ImageStore, option: str) -> ViewTransform:
    """The transform of a view's text. Raises InputError if it cannot be read or does not fit the store's images."""
    if text.strip() == "native":
        raise InputError(f"the view 'native' is that of a backbone; give {option}, such as 'resize(224,bicubic)'")
    view = parse_view(text)
    view.output_shape(store.image_shape)
    return ViewTransform(view)


def check_store(scenario: Scenario, store: ImageStore) -> None:
    """Raise InputError unless `store` can be the one that the scenario was built on, as far as one can see."""
    parts = [task.rows for task in scenario.tasks] + [group.rows for group in scenario.groups]
    highest = max(int(rows.max()) for rows in parts if len(rows))
    names = " + ".join(scenario.datasets)
    if names != store.name:
        raise InputError(
            f"scenario {scenario.id} is built on {names}, but this is the store of {store.name}; join the stores of "
            f"all its data sets, in their order, with clbench.data.join.join"
        )
    if highest >= len(store):
        raise InputError(f"scenario {scenario.id} has row {highest}, but the store of {store.name} has {len(store)}")


def data_fingerprint(images: NDArray[np.uint8], labels: NDArray[np.int64], split: NDArray[np.uint8]) -> str:
    """The fingerprint of a store from its contents, as `clbench.data.cache` makes it: what another framework computes
    to see that its rows are ours. images: (N, C, H, W), labels, split: (N,), all in row order."""
    digest = hashlib.sha256(f"{images.shape}\n".encode())
    for name, array in (("images", images), ("labels", labels.astype("<i8")), ("split", split)):
        digest.update(f"{name}:{hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()}\n".encode())
    return digest.hexdigest()
