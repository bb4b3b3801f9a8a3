"""Reference sets: images and texts that a method reads besides the scenario's, without labels (`Method.reference`)."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clbench import backbones, data
from clbench.data.catalogue import catalogue
from clbench.data.classes import TEST, TRAIN
from clbench.data.join import join
from clbench.data.reader import Reader
from clbench.data.store import ImageStore
from clbench.errors import InputError, unknown_name
from clbench.methods.base import Reference, ReferenceSpec
from clbench.rng import generator
from clbench.scenarios.prompts import PLAIN, class_texts, templates

__all__ = ["FoundReference", "find_reference"]

IMAGENET_NAMES = "imagenet-names"
SPLITS = {"train": TRAIN, "test": TEST}


class FoundReference(NamedTuple):
    """A reference set, what a record says of it, and its overlap with the scenario: a sentence, or None."""

    reference: Reference
    document: Mapping[str, Any]
    overlap: str | None


def find_reference(
    spec: ReferenceSpec,
    store: ImageStore,
    *,
    view: str,
    size: int | None,
    roots: Sequence[Path] = (),
    pretrained_on: Sequence[str] = (),
    allowed: bool = False,
) -> FoundReference:
    """Load a reference set for a scenario on `store`.

    view: the scenario's test view. size: its side in pixels, None for the reference's own. pretrained_on: tags of the
    backbone, compared with the reference's images for the record. allowed: an overlap is marked, not refused.

    Raises InputError if images or texts are missing or empty, if the images do not fit the network, and if they come
    from a collection that the scenario is made of.
    """
    stores = data.load_all(spec.images, roots=roots, size=size, scenario="the reference set")
    if not stores:
        raise InputError("the reference set has no images: name at least one data set in reference_images")
    overlap = overlap_of(stores, store)
    if overlap and not allowed:
        raise InputError(
            f"{overlap}: accuracy on images that training has used is no longer zero-shot; choose another reference "
            f"(--set reference_images=NAME), or mark the run by --allow-contamination"
        )
    joined = join(stores).to(store.device)
    rows = choose_rows(joined, spec)
    reader = Reader(joined, {"test": view})
    wanted = data.parse_view(view).output_shape(store.image_shape)
    if reader.output_shape("test") != wanted:
        raise InputError(
            f"reference images of {joined.name} are {shape_text(reader.output_shape('test'))} through the test view, "
            f"those of the scenario {shape_text(wanted)}: choose another reference, or put a resize into --test-view"
        )
    texts = tuple(text for name in spec.texts for text in read_texts(name, roots))
    if not texts:
        raise InputError("the reference set has no texts: name at least one source in reference_texts")
    digest = hashlib.sha256(f"{joined.fingerprint} {view} {size}".encode())
    digest.update(rows.cpu().numpy().astype("<i8").tobytes())
    digest.update("\n".join(texts).encode())

    def read(numbers: Tensor) -> Tensor:
        return reader(rows.index_select(0, numbers), None, "test")

    reference = Reference(len(rows), texts, read, digest.hexdigest())
    trained = backbones.guard([tag for tag in pretrained_on if tag != "unknown"], joined.images_of)
    document = {
        "images": [each.name for each in stores],
        "rows": spec.rows,
        "num_images": len(rows),
        "texts": list(spec.texts),
        "num_texts": len(texts),
        "fingerprint": digest.hexdigest(),
        "overlap": overlap,
        "pretrained": trained,
    }
    return FoundReference(reference, document, overlap)


def overlap_of(stores: Sequence[ImageStore], store: ImageStore) -> str | None:
    """Why reference images may not meet the scenario's, by the collections that both come from; None if they may."""
    for each in stores:
        own = each.images_of or (each.name,)
        shared = backbones.guard(own, store.images_of) is not None or each.name in (store.name, *store.group_names)
        if shared or each.fingerprint == store.fingerprint:
            return f"reference images of {each.name} come from where the scenario's images on {store.name} come from"
    return None


def choose_rows(store: ImageStore, spec: ReferenceSpec) -> Tensor:
    """(n,) int64 sorted rows of the store: those of the split, thinned to the limit."""
    if spec.rows == "all":
        rows = torch.arange(len(store))
    else:
        rows = (store.split.cpu() == SPLITS[spec.rows]).nonzero()[:, 0]
    if spec.limit is not None and len(rows) > spec.limit:
        order = torch.randperm(len(rows), generator=generator(0, "reference rows"))
        rows = rows[order[: spec.limit]].sort().values
    if not len(rows):
        raise InputError(f"the reference set {store.name} has no {spec.rows} rows; set reference_rows=all")
    return rows.to(store.device)


def read_texts(name: str, roots: Sequence[Path] = ()) -> list[str]:
    """Sentences of one source: see `ReferenceSpec`. Raises InputError."""
    if name == IMAGENET_NAMES:
        from open_clip import IMAGENET_CLASSNAMES  # takes seconds to import

        return [PLAIN[0].format(text) for text in IMAGENET_CLASSNAMES]
    path = Path(name).expanduser()
    if path.suffix in (".txt", ".tsv") or path.is_file():
        return read_lines(path)
    if name in catalogue():
        fine = catalogue()[name].class_names or fine_names(data.load(name, roots=roots))
        return [templates(name)[0].format(text) for text in class_texts(name, fine, "the reference set")]
    raise unknown_name("source of reference texts", name, [IMAGENET_NAMES, *catalogue()], "(or give a text file)")


def fine_names(store: ImageStore) -> tuple[str, ...]:
    """Names of the classes that images are labelled with, without coarser ones."""
    finest = int(store.classes.level.max())
    return tuple(n for n, at in zip(store.classes.names, store.classes.level.tolist(), strict=True) if at == finest)


def read_lines(path: Path) -> list[str]:
    """One sentence per line; of a `.tsv` file the first column, as Conceptual Captions are published."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read reference texts from {path}: {error}; give a UTF-8 text file") from error
    texts = [line.split("\t")[0].strip() if path.suffix == ".tsv" else line.strip() for line in lines]
    texts = [text for text in texts if text]
    if not texts:
        raise InputError(f"{path} holds no sentences; give a text file with one per line")
    return texts


def shape_text(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))
