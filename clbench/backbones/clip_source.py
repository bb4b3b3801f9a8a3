"""Models of open_clip by name and tag or with a file, and clip-small: networks, tokenizers, views, provenance.

A name is `clip:MODEL.TAG`, the tag one of open_clip's published weights; or `clip:MODEL` with a file or random weights.
QuickGELU and GELU models have the same keys, so nothing but the name tells which one a file wants: a name and a tag
that disagree are refused, and so is a file under a bare name that stands for both.
"""

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from clbench.backbones.weights import WeightsFile, first_line, load_into, read_weights
from clbench.errors import InputError, unknown_name

__all__ = ["PREFIX", "ClipName", "MadeClip", "make", "native_view", "resolve"]

PREFIX = "clip:"
SMALL = "clip-small"
QUICK = "-quickgelu"
OPENAI = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SMALL_VIEW = "rgb resize(64,bicubic)"
OPTIONS = ("micro_batch", "micro_texts", "grad_checkpointing", "quick_gelu")
# OpenAI's archives hold these numbers beside the weights; TorchScript also saves the mask, which is no weight.
EXTRA = ("input_resolution", "context_length", "vocab_size", "attn_mask")


class MadeClip(NamedTuple):
    """A network with its weights and tokenizer; the other fields as those of `factory.Made`."""

    net: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    name: str
    random: bool
    tags: tuple[str, ...] = ()
    view: str | None = None
    metadata: Mapping[str, str] = {}


@dataclass(frozen=True)
class ClipName:
    """A name, resolved. tag: "" where the name stands for the architecture alone. config: what open_clip says about
    the tag's weights."""

    model: str
    tag: str
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.model}.{self.tag}" if self.tag else f"{PREFIX}{self.model}"

    @property
    def pretrained_on(self) -> tuple[str, ...]:
        """All of open_clip's tags are of images and texts from the web; some went on with, or began from, others."""
        if not self.tag:
            return ()
        tags = {"web"}
        if "mscoco" in self.tag:
            tags.add("mscoco")
        if self.model.startswith("EVA"):  # image towers begun on Merged-30M or -38M
            tags.add("imagenet21k")
        return tuple(sorted(tags))


def resolve(name: str) -> ClipName:
    """Raises InputError for an unknown model or tag, and for a model of another activation than the tag's weights."""
    import open_clip

    text = name.removeprefix(PREFIX)
    models = open_clip_models()
    model, _, tag = (text, "", "") if text in models else text.rpartition(".")
    if model not in models:
        raise unknown_name(f"model of open_clip in backbone {name}:", model or text, models)
    if not tag:
        return ClipName(model, "", {})
    tags = open_clip.list_pretrained_tags_by_model(model)
    config = open_clip.pretrained.get_pretrained_cfg(model, tag)
    if not config:
        raise unknown_name(f"weights of open_clip for {model}:", tag, tags or ["none are published"])
    found = ClipName(model, tag, config)
    if bool(config.get("quick_gelu", False)) != quick_gelu(model):
        other = model.removesuffix(QUICK) if quick_gelu(model) else model + QUICK
        raise InputError(
            f"backbone {found.name}: the weights {tag} were trained with {activation(not quick_gelu(model))}, but "
            f"model {model} has {activation(quick_gelu(model))}, which would lower its accuracy without a word; "
            f"take {PREFIX}{other}.{tag}"
        )
    return found


def open_clip_models() -> tuple[str, ...]:
    import open_clip

    return tuple(model for model in open_clip.list_models() if model != SMALL)


def quick_gelu(model: str) -> bool:
    import open_clip

    return bool((open_clip.get_model_config(model) or {}).get("quick_gelu", False))


def activation(quick: bool) -> str:
    return "QuickGELU" if quick else "GELU"


def native_view(name: str, *, weights: Path | None, pretrained: bool) -> str | None:
    """The evaluation pipeline of the weights, None for random ones and for a file under a name without tag."""
    if name == SMALL:
        return SMALL_VIEW if pretrained or weights is not None else None
    found = resolve(name)
    return view_of(found) if found.tag else None


def view_of(found: ClipName) -> str:
    import open_clip

    config = found.config
    size = open_clip.get_model_config(found.model)["vision_cfg"]["image_size"]
    if isinstance(size, list | tuple):
        size = size[0]
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if (mean, std) == OPENAI:
        numbers = "clip"
    elif len(set(mean)) == len(set(std)) == 1:
        numbers = f"{mean[0]},{std[0]}"
    else:
        numbers = ",".join(map(str, (*mean, *std)))
    how = config.get("interpolation", "bicubic")
    resize = f"resize({size},{how})" if config.get("resize_mode") == "squash" else f"resize_short({size},{how})"
    return f"rgb {resize} center_crop({size}) normalize({numbers})"


# -- building --------------------------------------------------------------------------------------------------------
def make(name: str, weights: Path | None, pretrained: bool, options: Mapping[str, Any], channels: int) -> MadeClip:
    """The network with its weights; random ones come from torch's default generator.

    options: `quick_gelu` true|false for a file under a bare name, `grad_checkpointing`; the others are the caller's.
    Raises InputError for weights that cannot be had or do not fit, and for images that are not RGB.
    """
    for key in options:
        if key not in OPTIONS:
            raise unknown_name(f"option of backbone {name}", key, OPTIONS)
    if channels != 3:
        raise InputError(f"backbone {name} takes RGB images, not {channels} channel: put rgb at the start of the views")
    made = make_small(weights, pretrained) if name == SMALL else make_open_clip(name, weights, pretrained, options)
    checkpointing = options.get("grad_checkpointing", False)
    if not isinstance(checkpointing, bool):
        raise InputError(f"option grad_checkpointing of backbone {name} is true or false, not {checkpointing!r}")
    if checkpointing:
        made.net.set_grad_checkpointing(True)  # type: ignore[operator]  # nn.Module hides the type of attributes
    return made


def make_small(weights: Path | None, pretrained: bool) -> MadeClip:
    import open_clip

    from clbench.backbones import clip_small

    open_clip.add_model_config(clip_small.CONFIG)
    with quiet():
        net: nn.Module = open_clip.create_model(SMALL)
    config = json.loads(clip_small.CONFIG.read_text(encoding="utf-8"))["text_cfg"]
    tokenizer = clip_small.WordTokenizer(clip_small.words(), config["context_length"], config["vocab_size"])
    if weights is None and not pretrained:
        return MadeClip(net, tokenizer, SMALL, random=True)
    file = read_weights(weights or clip_small.WEIGHTS)
    known = file.metadata.get("vocabulary")
    if known is not None and known != clip_small.vocabulary_digest():
        raise InputError(
            f"weights file {file.path} was trained with another vocabulary than this version of clbench has: train it "
            f"again with `clbench pretrain clip-small`"
        )
    load_into(net, file, SMALL)
    return MadeClip(net, tokenizer, SMALL, random=False, view=SMALL_VIEW, metadata=file.metadata)


def make_open_clip(name: str, weights: Path | None, pretrained: bool, options: Mapping[str, Any]) -> MadeClip:
    import open_clip

    found = resolve(name)
    quick = activation_wanted(found, weights, options)
    if weights is None and pretrained and not found.tag:
        tags = open_clip.list_pretrained_tags_by_model(found.model)
        raise InputError(
            f"backbone {name} names no weights: "
            + (f"write the tag out ({name}.{tags[0]}; there are {', '.join(tags)}), " if tags else "")
            + "give --weights FILE, or start from random weights with --backbone-set pretrained=false"
        )
    if weights is None and pretrained:
        weights, published = published_file(found), True
    else:
        published = False
    with quiet():
        net: nn.Module = open_clip.create_model(found.model, pretrained_text=False, quick_gelu=quick)
        tokenizer = open_clip.get_tokenizer(found.model)
    if weights is None:
        return MadeClip(net, tokenizer, f"{PREFIX}{found.model}", random=True)
    file = read_clip_file(weights)
    load_into(net, file, found.name, convert=convert)
    metadata = {} if published else file.metadata
    view = view_of(found) if found.tag else None
    return MadeClip(net, tokenizer, found.name, False, found.pretrained_on, view, metadata)


def activation_wanted(found: ClipName, weights: Path | None, options: Mapping[str, Any]) -> bool:
    """QuickGELU or not. A file under a bare name whose model is published with both must say it."""
    import open_clip

    own = quick_gelu(found.model)
    given = options.get("quick_gelu")
    if given is not None and not isinstance(given, bool):
        raise InputError(f"option quick_gelu of backbone {found.name} is true or false, not {given!r}")
    if given is not None and given != own:
        other = found.model.removesuffix(QUICK) if own else found.model + QUICK
        raise InputError(
            f"backbone {found.name} has {activation(own)}: take {PREFIX}{other} in place of "
            f"quick_gelu={str(given).lower()}"
        )
    both = not own and f"{found.model}{QUICK}" in open_clip_models()
    if weights is not None and not found.tag and both and given is None:
        tags = open_clip.list_pretrained_tags_by_model(found.model + QUICK)
        raise InputError(
            f"backbone {found.name} with a file: nothing in it says whether it was trained with GELU or QuickGELU "
            f"({', '.join(tags)} were with QuickGELU); take {PREFIX}{found.model}{QUICK}, or name its tag "
            f"({PREFIX}{found.model}.TAG), or confirm GELU with --backbone-set quick_gelu=false"
        )
    return own


def read_clip_file(path: Path) -> WeightsFile:
    """As `read_weights`; OpenAI's own files are TorchScript archives, of which the weights alone are taken."""
    import torch

    try:
        return read_weights(path)
    except InputError as error:
        if "TorchScript" not in str(error.__cause__):
            raise
    try:
        with warnings.catch_warnings():  # torch.jit is deprecated, and OpenAI's files stay what they are
            warnings.simplefilter("ignore", FutureWarning)
            archive = torch.jit.load(str(path), map_location="cpu")
        state = {key: value for key, value in archive.state_dict().items() if key not in EXTRA}
    except Exception as error:  # torch's reader has errors of many kinds
        raise InputError(
            f"weights file {path} cannot be read as a TorchScript archive: {first_line(error)}; get the file again"
        ) from error
    return WeightsFile(path, {key: value.float() for key, value in state.items()}, {})


def convert(state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    """Published files of other layouts, as open_clip itself takes them."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    own = net.state_dict()
    state = convert_state_dict(net, {key: value for key, value in state.items() if key not in EXTRA})
    if "positional_embedding" in state and "positional_embedding" not in own:
        state = convert_to_custom_text_state_dict(state)
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in own:
            state[key] = state[key].reshape(own[key].shape)
    state.pop("text.transformer.embeddings.position_ids", None)
    return state


def published_file(found: ClipName) -> Path:
    """The file of a tag, from the caches of huggingface_hub or open_clip, else downloaded."""
    from clbench.backbones.timm_source import PROBE_S

    repository, _, filename = str(found.config.get("hf_hub", "")).rpartition("/")
    url = str(found.config.get("url", ""))
    if not repository:
        return from_url(found, url, PROBE_S)
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    names = [filename] if filename else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    if filename.endswith((".bin", ".pth")):
        names.insert(0, filename.rpartition(".")[0] + ".safetensors")
    for file in names:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return Path(cached)
    reason = "it has no such file"
    for file in names:
        try:
            # Asked first because a download without a network is retried for most of a minute.
            get_hf_file_metadata(hf_hub_url(repository, file), timeout=PROBE_S)
            return Path(hf_hub_download(repository, file))
        except Exception as error:  # hub and HTTP clients have errors of their own, which change with their versions
            reason = first_line(error)
    raise not_available(found, f"{names[0]} of the Hugging Face repository {repository}", reason)


def from_url(found: ClipName, url: str, timeout: float) -> Path:
    from urllib.request import Request, urlopen

    from open_clip.pretrained import download_pretrained_from_url

    cached = Path.home() / ".cache" / "clip" / url.rpartition("/")[2]
    try:
        if not cached.exists():
            with urlopen(Request(url, method="HEAD"), timeout=timeout):
                pass
        return Path(download_pretrained_from_url(url))
    except (OSError, RuntimeError) as error:  # URLError and HTTPError are OSErrors
        raise not_available(found, url, first_line(error)) from error


def not_available(found: ClipName, what: str, reason: str) -> InputError:
    return InputError(
        f"the weights of {found.name} are not on this machine and cannot be downloaded ({reason}): fetch {what} on "
        f"another machine and give it as --weights FILE with the same --backbone, or start from random weights with "
        f"--backbone {PREFIX}{found.model} --backbone-set pretrained=false, or take clip-small, which is built in"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """open_clip logs to the root logger that it starts from random weights, which is what is wanted here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
