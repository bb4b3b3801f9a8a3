"""Several data sets as one store: what a stream over many domains is read from."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clbench.data.cache import cache_folder, open_entry, write_entry
from clbench.data.classes import ClassTable
from clbench.data.store import ImageStore
from clbench.errors import InputError

__all__ = ["join"]


class Joined:
    """The rows of several image arrays, one behind the other, grey ones as RGB: an array to `write_entry`."""

    def __init__(self, parts: Sequence[NDArray[np.uint8]]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        channels = max(part.shape[1] for part in parts)
        self.shape = (int(self.starts[-1]), channels, *parts[0].shape[2:])

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Rows in ascending order, as `write_entry` asks for them."""
        blocks = []
        for part, start, end in zip(self.parts, self.starts, self.starts[1:], strict=False):
            own = rows[(rows >= start) & (rows < end)] - start
            if len(own):
                block = part[own[0] : own[-1] + 1]
                blocks.append(np.broadcast_to(block, (len(block), *self.shape[1:])))
        return np.concatenate(blocks)


def join(stores: Sequence[ImageStore]) -> ImageStore:
    """The stores as one: rows, labels and classes of each behind those of the one before it; `groups` says which store
    a row came from, `group_names` are their names. Grey images become RGB if any store has colours.

    The joined images are kept in the cache, so that memory stays small; they need their size on disk once more.
    Raises InputError if the images differ in size: load all with the same `size`.
    """
    if len(stores) == 1:
        return stores[0]
    sizes = {store.name: store.image_shape[1:] for store in stores}
    if len(set(sizes.values())) > 1:
        given = ", ".join(f"{name} {height}x{width}" for name, (height, width) in sizes.items())
        raise InputError(
            f"data sets of one stream need images of one size, not {given}; give --scenario-set size=PIXELS"
        )
    key = hashlib.sha256(json.dumps([1, *(store.fingerprint for store in stores)]).encode()).hexdigest()[:16]
    folder = cache_folder() / "store" / f"joined-{key}"
    entry = open_entry(folder)
    if entry is None:
        build(folder, stores)
        entry = open_entry(folder)
    if entry is None:
        raise InputError(
            f"{folder} cannot be read back after writing it: check the disk, or set CLBENCH_CACHE elsewhere"
        )
    return ImageStore(
        images=torch.from_numpy(entry.images),
        labels=torch.from_numpy(entry.labels),
        split=torch.from_numpy(entry.split),
        classes=joined_classes(stores),
        name=" + ".join(store.name for store in stores),
        fingerprint=entry.manifest["fingerprint"],
        groups=None if entry.groups is None else torch.from_numpy(entry.groups),
        group_names=tuple(store.name for store in stores),
        images_of=tuple(dict.fromkeys(name for store in stores for name in store.images_of)),
    )


def build(folder: Path, stores: Sequence[ImageStore]) -> None:
    """Write the cache entry."""
    images = Joined([store.images.cpu().numpy() for store in stores])
    offsets = np.cumsum([0, *(len(store.classes) for store in stores)])
    columns = {
        "labels": np.concatenate([store.labels.cpu().numpy() + o for store, o in zip(stores, offsets, strict=False)]),
        "split": np.concatenate([store.split.cpu().numpy() for store in stores]),
        "groups": np.repeat(np.arange(len(stores)), [len(store) for store in stores]),
    }
    facts = {"name": folder.name, "parts": [store.name for store in stores]}
    write_entry(folder, images, np.arange(images.shape[0]), columns, facts)


def joined_classes(stores: Sequence[ImageStore]) -> ClassTable:
    """Class tables one behind the other, ids and parents moved along."""
    offsets = np.cumsum([0, *(len(store.classes) for store in stores)]).tolist()
    return ClassTable(
        names=tuple(name for store in stores for name in store.classes.names),
        level=torch.cat([store.classes.level for store in stores]),
        parent=torch.cat(
            [
                torch.where(store.classes.parent >= 0, store.classes.parent + offset, -1)
                for store, offset in zip(stores, offsets, strict=False)
            ]
        ),
    )
