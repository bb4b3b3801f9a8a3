"""From a name to a backbone: built in, timm or open_clip; initial weights from the run's seed or from a file."""

import ast
import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from clbench.backbones.backbone import Backbone, fingerprint
from clbench.backbones.catalogue import EMBEDDED, is_clip
from clbench.backbones.embedded import make_embedded
from clbench.backbones.provenance import UNKNOWN, parse_tags
from clbench.backbones.weights import first_line, load_into, read_weights
from clbench.errors import InputError, unknown_name
from clbench.rng import derive_seed

if TYPE_CHECKING:
    from clbench.backbones.clip_model import ClipBackbone

__all__ = ["build", "native_view", "parse_option"]

Shape = tuple[int, int, int]

# Options that clbench itself understands, for every backbone; the first value is the default.
FINAL_NORM = ("pretrained", "fresh")  # fresh: a new LayerNorm with eps 1e-5 in place of the last one (slca card, 1)
FEATURE = ("pooled", "cls")  # cls: the class token after the final norm (nmc card, 1)
NOT_GIVEN = object()


class Made(NamedTuple):
    """A network with its initial weights. tags: what they were pretrained on as far as its name says; metadata: what
    their file says; random: nothing was loaded."""

    net: nn.Module
    name: str
    random: bool
    tags: tuple[str, ...] = ()
    view: str | None = None
    metadata: Mapping[str, str] = {}


def build(
    name: str,
    *,
    in_shape: Shape,
    seed: int,
    weights: Path | None = None,
    pretrained: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Backbone:
    """Build a backbone on the CPU, in training mode.

    name: a built-in one (`list_backbones`), a name of timm's with its tag, or `clip:` and a model of open_clip's, which
        gives a `ClipBackbone` (`clbench.backbones.clip_model`).
    in_shape: (C, H, W) of the images it will get, after the view.
    seed: initial weights depend on it alone; torch's global generator is left as it was.
    weights: a safetensors or torch file (or `.npz` of the ViT authors), in place of the published ones.
    pretrained: False starts a backbone of timm or open_clip, or clip-small, from random weights.
    options: `final_norm` pretrained|fresh; `feature` pooled|cls; `pretrained_on` TAG[,TAG] or none, what the weights
        were trained on where nothing else says it; `pretrained`, in place of the argument; all others are the
        backbone's own (`list_backbones`; arguments of timm.create_model). Texts are read as the Python values they
        spell.

    >>> build("reduced-resnet18", in_shape=(3, 32, 32), seed=0).num_features
    160

    Raises InputError for an unknown name or option, for weights that cannot be had, be read or do not fit, and for
    images that the network cannot take.
    """
    own = {key: parse_option(value) for key, value in (options or {}).items()}
    declared = own.pop("pretrained_on", NOT_GIVEN)
    final_norm = one_of("final_norm", own.pop("final_norm", FINAL_NORM[0]), FINAL_NORM)
    feature = one_of("feature", own.pop("feature", FEATURE[0]), FEATURE)
    pretrained = one_of("pretrained", own.pop("pretrained", pretrained), (True, False))
    weights = None if weights is None else Path(weights)
    if len(in_shape) != 3 or min(in_shape) < 1:
        raise InputError(f"backbone {name} needs images of shape (C, H, W), not {tuple(in_shape)}; check the view")
    if is_clip(name):
        return build_clip(name, in_shape, seed, weights, pretrained, final_norm, feature, declared, own)
    with initial_draws(seed):
        if name in EMBEDDED:
            made = from_catalogue(name, in_shape, weights, own)
        else:
            made = from_timm(name, in_shape, weights, pretrained, own)
    if final_norm == "fresh":
        refresh_final_norm(made)
    if feature == "cls" and not (getattr(made.net, "has_class_token", False) and hasattr(made.net, "forward_features")):
        raise InputError(f"backbone {made.name} has no class token: leave out feature=cls")
    shaping = json.dumps({"final_norm": final_norm, "feature": feature, **own}, sort_keys=True, default=str)
    backbone = Backbone(
        made.net,
        name=made.name,
        identity=f"{made.name.split('.')[0]} {shaping}",
        in_shape=in_shape,
        pretrained_on=provenance(made, declared),
        native_view=made.view,
        class_token=feature == "cls",
    )
    backbone.num_features = measure_width(backbone)
    backbone.fingerprint = fingerprint(backbone)
    return backbone


def native_view(name: str, *, weights: Path | None = None, pretrained: bool = True) -> str | None:
    """The evaluation pipeline that the weights of `name` were published with, as view text; builds nothing.

    None for built-in backbones, for random weights, and for a file of weights under a name without tag, whose pipeline
    is not known. Raises InputError as `build`.
    """
    if name in EMBEDDED:
        return None
    if is_clip(name):
        from clbench.backbones import clip_source

        return clip_source.native_view(name, weights=weights, pretrained=pretrained)
    from clbench.backbones import timm_source

    published = weights is None and pretrained
    found = timm_source.resolve(name, published=published)
    return found.view if found.tag and (published or weights is not None) else None


def build_clip(
    name: str,
    in_shape: Shape,
    seed: int,
    weights: Path | None,
    pretrained: bool,
    final_norm: str,
    feature: str,
    declared: Any,
    own: dict[str, Any],
) -> "ClipBackbone":
    """A backbone with a text tower; `own` are the options of `clip_source.make`, `micro_batch` and `micro_texts`."""
    from clbench.backbones import clip_source  # open_clip takes seconds to import
    from clbench.backbones.clip_model import ClipBackbone

    if final_norm == "fresh" or feature == "cls":
        raise InputError(
            f"backbone {name} has one feature, which its texts are compared with: leave out final_norm and feature"
        )
    micro = {key: whole_number(name, key, own.get(key)) for key in ("micro_batch", "micro_texts")}
    with initial_draws(seed):
        made = clip_source.make(name, weights, pretrained, own, in_shape[0])
    backbone = ClipBackbone(
        made.net,
        made.tokenizer,
        **micro,
        name=made.name,
        identity=made.name.split(".")[0],
        in_shape=in_shape,
        pretrained_on=provenance(Made(made.net, made.name, made.random, made.tags, made.view, made.metadata), declared),
        native_view=made.view,
    )
    backbone.num_features = measure_width(backbone)
    backbone.fingerprint = fingerprint(backbone)
    return backbone


def whole_number(name: str, key: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"option {key} of backbone {name} must be a whole number above 0, not {value!r}")
    return value


def from_catalogue(name: str, in_shape: Shape, weights: Path | None, options: Mapping[str, Any]) -> Made:
    net = make_embedded(name, in_shape, options)
    if weights is None:
        return Made(net, name, random=True)
    file = read_weights(weights)
    load_into(net, file, name)
    return Made(net, name, random=False, metadata=file.metadata)


def from_timm(name: str, in_shape: Shape, weights: Path | None, pretrained: bool, options: Mapping[str, Any]) -> Made:
    from clbench.backbones import timm_source  # timm takes seconds to import; built-in backbones do without

    published = weights is None and pretrained
    found = timm_source.resolve(name, published=published)
    if weights is None and not pretrained:
        return Made(timm_source.create(found, in_shape, options, any_size=True), found.architecture, random=True)
    if weights is None:
        channels = found.config.input_size[0]
        if in_shape[0] != channels:
            raise InputError(
                f"the weights of {found.name} take images of {channels} channels, not {in_shape[0]}: put rgb at the "
                f"start of the views, or start from random weights with --backbone-set pretrained=false"
            )
        weights = timm_source.published_file(found)
    net = timm_source.create(found, in_shape, options, any_size=False)
    metadata: Mapping[str, str] = {}
    if weights.suffix == ".npz":
        timm_source.load_npz(net, weights, found)
    else:
        file = read_weights(weights)
        timm_source.load_file(net, file, found)
        metadata = {} if published else file.metadata
    timm_source.fit_size(net, in_shape, found, options)
    if not found.tag and not published:  # a file under a bare name: the default tag says nothing about it
        return Made(net, found.name, random=False, metadata=metadata)
    return Made(net, found.name, False, found.pretrained_on, found.view, metadata)


def parse_option(value: Any) -> Any:
    """A text from the command line -> the Python value it spells (1e-3, true, none, (96, 128)), or the text itself."""
    if not isinstance(value, str):
        return value
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return words[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def one_of(key: str, value: Any, valid: tuple[Any, ...]) -> Any:
    if value not in valid:
        raise unknown_name(f"value of backbone option {key}:", str(value), [str(item) for item in valid])
    return value


@contextlib.contextmanager
def initial_draws(seed: int) -> Iterator[None]:
    """Inside, torch's default CPU generator starts from the seed; outside, nothing has changed. The initialisers of
    PyTorch and timm know no other generator. (`torch.manual_seed` would reseed every GPU as well.)"""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "init"))
        yield


def refresh_final_norm(made: Made) -> None:
    """Throw the pretrained final LayerNorm away, as SLCA does: weight 1, bias 0, eps 1e-5 (slca card, section 1)."""
    norm = getattr(made.net, "norm", None)
    if not isinstance(norm, nn.LayerNorm):
        raise InputError(f"backbone {made.name} has no final LayerNorm to replace: leave out final_norm=fresh")
    made.net.norm = nn.LayerNorm(norm.normalized_shape, eps=1e-5)


def provenance(made: Made, declared: Any) -> tuple[str, ...]:
    """Tags of what the weights were pretrained on. What a name or a file says stays: the option adds to it."""
    given = declared is not NOT_GIVEN
    if made.random:
        if given:
            raise InputError(
                f"pretrained_on is given but backbone {made.name} starts from random weights: add --weights FILE, or "
                f"leave it out"
            )
        return ()
    words = declared if isinstance(declared, list | tuple) else [declared] if given else []
    texts = [made.metadata.get("pretrained_on", ""), *map(str, words)]
    tags = {*made.tags, *parse_tags(",".join(texts))}
    if given or "pretrained_on" in made.metadata:
        tags -= {UNKNOWN}
    else:
        tags = tags or {UNKNOWN}
    return tuple(sorted(tags))


def measure_width(backbone: Backbone) -> int:
    """Number of features, from one empty image; refuses images that the network cannot take."""
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad():
            out = backbone(torch.zeros((1, *backbone.in_shape)))
    except (AssertionError, RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"backbone {backbone.name} cannot take images of shape {backbone.in_shape}: {first_line(error)}; "
            f"change their size or channels in the view"
        ) from error
    for module, mode in modes.items():
        module.training = mode
    if out.ndim != 2:
        raise InputError(
            f"backbone {backbone.name} answers with shape {tuple(out.shape)}, not one vector of features per image: "
            f"leave out the option that switches its pooling off"
        )
    return int(out.shape[1])
