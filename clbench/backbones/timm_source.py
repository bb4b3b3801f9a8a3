"""Backbones from timm: names with their tag, published weights or a file's, the view they were trained for."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import timm.models
from torch import nn

from clbench.backbones.catalogue import EMBEDDED
from clbench.backbones.provenance import tags_of_timm
from clbench.backbones.weights import WeightsFile, first_line, load_into
from clbench.errors import InputError, unknown_name

__all__ = ["TimmName", "create", "fit_size", "load_file", "load_npz", "published_file", "resolve"]

# Architectures whose default tag in timm is not the weights that papers mean by the bare name: the tag must be given.
AMBIGUOUS = {"vit_base_patch16_224"}
# What timm's modules call the function that turns published files of other layouts into timm's.
CONVERTERS = ("checkpoint_filter_fn", "checkpoint_filter_fn_encoder", "_filter_fn", "_filter_torchvision_pretrained")
PROBE_S = 5.0  # how long the hub may take to answer before it counts as out of reach
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TimmName:
    """A name of timm's, resolved. tag: "" where the name stands for the architecture alone."""

    architecture: str
    tag: str
    config: Any  # timm's PretrainedCfg of the tag; of the default tag where there is none

    @property
    def name(self) -> str:
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture

    @property
    def pretrained_on(self) -> tuple[str, ...]:
        return tags_of_timm(self.tag)

    @property
    def view(self) -> str | None:
        """timm's evaluation pipeline for these weights, as view text; None where views have no such cropping."""
        config = self.config
        size, width = config.input_size[1:]
        resize = {"center": "resize_short", "squash": "resize"}.get(config.crop_mode)
        if size != width or resize is None or config.interpolation not in ("bilinear", "bicubic"):
            return None
        mean, std = tuple(config.mean), tuple(config.std)
        if (mean, std) == IMAGENET:
            numbers = "imagenet"
        elif len(set(mean)) == len(set(std)) == 1:
            numbers = f"{mean[0]},{std[0]}"
        else:
            numbers = ",".join(map(str, (*mean, *std)))
        return (
            f"{'rgb ' if config.input_size[0] == 3 else ''}"
            f"{resize}({math.floor(size / config.crop_pct)},{config.interpolation}) "
            f"center_crop({size}) normalize({numbers})"
        )


def resolve(name: str, *, published: bool) -> TimmName:
    """Look `name` up in timm. published: its published weights are wanted; a name without tag means timm's default.

    Raises InputError for an unknown name or tag, and for a bare name whose default is not what papers mean by it.
    """
    name = timm.models.get_deprecated_models().get(name) or name
    architecture, tag = timm.models.split_model_name_tag(name)
    if not timm.models.is_model(architecture):
        raise unknown_name("backbone", name, [*EMBEDDED, *timm.list_models()])
    full_names = timm.list_models(f"{architecture}.*", include_tags=True)
    if tag and name not in full_names:
        raise unknown_name("backbone", name, full_names or [architecture])
    if published and not tag and architecture in AMBIGUOUS:
        raise InputError(
            f"backbone {architecture} has several published weights, and papers mean different ones by the bare name: "
            f"write the tag out, one of {', '.join(full_names)}"
        )
    config: Any = timm.models.get_pretrained_cfg(name)
    return TimmName(architecture, (config.tag or "") if published else tag, config)


def create(found: TimmName, in_shape: tuple[int, int, int], options: Mapping[str, Any], *, any_size: bool) -> nn.Module:
    """The network without classifier, with initial weights from torch's default generator.

    any_size: for the size of `in_shape` at once; otherwise for the size of its weights, until `fit_size`.
    Raises InputError for options that timm does not take.
    """
    arguments = {"num_classes": 0, "in_chans": in_shape[0], **options}
    if any_size and found.config.fixed_input_size:
        arguments.setdefault("img_size", in_shape[1:])
    try:
        net: nn.Module = timm.create_model(found.name, pretrained=False, **arguments)
    except Exception as error:  # options reach timm's constructors as they are, which fail in their own ways
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise InputError(
            f"timm cannot build backbone {found.name} for images of shape {in_shape}"
            f"{f' with {given}' if given else ''}: {first_line(error)}; options (--backbone-set) must be arguments "
            f"of timm.create_model for it"
        ) from error
    return net


def fit_size(net: Any, in_shape: tuple[int, int, int], found: TimmName, options: Mapping[str, Any]) -> None:
    """Adapt a network of fixed input size (its position embeddings) to the images, once its weights are loaded."""
    size = options.get("img_size", found.config.input_size[1:])
    size = (size, size) if isinstance(size, int) else tuple(size)
    fixed = found.config.fixed_input_size and not options.get("dynamic_img_size", False)
    if fixed and size != in_shape[1:] and hasattr(net, "set_input_size"):
        try:
            net.set_input_size(img_size=in_shape[1:])
        except (AssertionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"backbone {found.name} cannot take images of {in_shape[1]} x {in_shape[2]} px ({first_line(error)}); "
                f"resize in the view, to {size[0]} px as in its pretraining"
            ) from error


def load_file(net: nn.Module, file: WeightsFile, found: TimmName) -> None:
    """Load a weights file in timm's layout, or in one that timm's module of this architecture converts."""
    names = found.config.classifier or ()
    module = sys.modules[timm.models.model_entrypoint(found.architecture).__module__]
    convert = next((getattr(module, name) for name in CONVERTERS if hasattr(module, name)), None)
    load_into(net, file, found.name, classifiers=(names,) if isinstance(names, str) else names, convert=convert)


def load_npz(net: Any, path: Path, found: TimmName) -> None:
    """Load weights in the JAX layout of the ViT authors, where timm reads it for this architecture."""
    if not path.is_file():
        raise InputError(f"cannot read weights file {path}: no such file; check the path given to --weights")
    if not hasattr(net, "load_pretrained"):
        raise InputError(f"backbone {found.name} cannot be loaded from {path}: timm reads .npz weights of ViTs only")
    try:
        net.load_pretrained(str(path))
    except Exception as error:  # numpy and timm fail in many ways on a file that is damaged or of another network
        raise InputError(
            f"weights file {path} does not fit backbone {found.name} or is damaged: {first_line(error)}; "
            f"give the file that belongs to this backbone"
        ) from error


def published_file(found: TimmName) -> Path:
    """The published weights: a file in the cache of the hub's client, downloaded if need be.

    Raises InputError within seconds if it cannot be had.
    """
    if found.config.hf_hub_id:
        return from_hub(found)
    if found.config.url:
        return from_url(found)
    raise InputError(
        f"timm publishes no weights for {found.name}: give --weights FILE, or start from random weights with "
        f"--backbone-set pretrained=false"
    )


def from_hub(found: TimmName) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, commit = found.config.hf_hub_id.partition("@")
    revision = commit or None
    plain = found.config.hf_hub_filename or "pytorch_model.bin"
    names = list(dict.fromkeys([plain.replace("pytorch_model.bin", "model.safetensors"), plain]))
    for name in names:
        cached = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
    reason = "it has no such file"
    for name in names:
        try:
            # Asked first because a download without a network is retried for most of a minute.
            get_hf_file_metadata(hf_hub_url(repository, name, revision=revision), timeout=PROBE_S)
            return Path(hf_hub_download(repository, name, revision=revision))
        except LocalEntryNotFoundError as error:  # by class an EntryNotFoundError, but it means out of reach
            reason = first_line(error)
            break
        except EntryNotFoundError:
            continue
        except Exception as error:  # hub and HTTP clients have errors of their own, which change with their versions
            reason = first_line(error)
            break
    raise not_available(found, f"{names[0]} of the Hugging Face repository {repository}", reason)


def from_url(found: TimmName) -> Path:
    from urllib.request import Request, urlopen

    from torch.hub import download_url_to_file, get_dir

    url = str(found.config.url)
    path = Path(get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with urlopen(Request(url, method="HEAD"), timeout=PROBE_S):
                pass
            download_url_to_file(url, str(path), progress=False)
        except OSError as error:  # URLError and HTTPError are OSErrors
            raise not_available(found, url, first_line(error)) from error
    return path


def not_available(found: TimmName, what: str, reason: str) -> InputError:
    return InputError(
        f"the weights of {found.name} are not on this machine and cannot be downloaded ({reason}): fetch {what} on "
        f"another machine and give it as --weights FILE, or start from random weights with --backbone-set "
        f"pretrained=false, or take a built-in backbone ({', '.join(EMBEDDED)})"
    )
