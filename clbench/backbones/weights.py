"""Weight files: read safely (never as a pickle of objects), matched strictly, refused in one sentence."""

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clbench.errors import InputError

__all__ = ["WeightsFile", "first_line", "load_into", "read_weights"]

State = dict[str, Tensor]

NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")  # as timm: averaged weights first
WRAPPERS = ("module.", "_orig_mod.", "backbone.", "base_encoder.", "net.")
CLASSIFIERS = ("head", "fc", "classifier", "linear", "logits")


class WeightsFile(NamedTuple):
    """state: tensors by key. metadata: the file's own strings (`pretrained_on` is one that clbench knows)."""

    path: Path
    state: State
    metadata: Mapping[str, str]


def read_weights(path: Path) -> WeightsFile:
    """Read a safetensors file, or a torch file that holds a state dict (alone, or as in training checkpoints below
    `state_dict` or `model`), to the CPU.

    Raises InputError if the file is missing, truncated or corrupt, or holds no state dict, or numbers not finite.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(
            f"cannot read weights file {path}: {error.strerror or error}; check the path given to --weights"
        ) from error
    if path.suffix == ".safetensors" or start[8:] == b"{":
        state, metadata = read_safetensors(path)
    else:
        state, metadata = read_torch(path)
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InputError(f"weights file {path} is damaged: {key!r} has numbers that are not finite; get it again")
    return WeightsFile(path, state, metadata)


def read_safetensors(path: Path) -> tuple[State, Mapping[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(path, error) from error


def read_torch(path: Path) -> tuple[State, Mapping[str, str]]:
    try:
        # Training scripts put their parsed arguments beside the weights; a Namespace is as harmless as a dict.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a corrupt file can break torch's reader anywhere: RuntimeError, EOFError, KeyError ...
        if "Unsupported global" in str(error):
            raise InputError(
                f"weights file {path} holds Python objects, which are not loaded because they could run code; "
                f"save the state dict alone: torch.save(model.state_dict(), FILE)"
            ) from error
        raise unreadable(path, error) from error
    metadata: dict[str, str] = {}
    while isinstance(content, Mapping):
        metadata |= {key: value for key, value in content.items() if isinstance(value, str)}
        nested = next((key for key in NESTED if isinstance(content.get(key), Mapping)), None)
        if nested is None:
            break
        content = content[nested]
    items = content.items() if isinstance(content, Mapping) else ()
    state = {key: value for key, value in items if isinstance(value, Tensor)}
    if not state:
        raise InputError(
            f"weights file {path} holds no state dict but a {type(content).__name__}; "
            f"save one with torch.save(model.state_dict(), FILE), or as safetensors"
        )
    return state, metadata


def first_line(error: Exception, most: int = 160) -> str:
    """The start of an error of another library, to be quoted inside a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most].rstrip(".: ")


def unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"weights file {path} cannot be read as safetensors or torch weights: it is truncated, corrupt or of another "
        f"kind ({first_line(error)}); get the file again"
    )


def load_into(
    net: nn.Module,
    file: WeightsFile,
    name: str,
    *,
    classifiers: Iterable[str] = (),
    convert: Callable[[State, nn.Module], State] | None = None,
) -> None:
    """Copy the file's tensors into `net`: all that it has, or none.

    Left out: the prefixes of wrappers (`module.` ...), the classifier (`classifiers` and the usual names). If the rest
    does not match, `convert(state, net)` gets one try. Raises InputError that names the first keys in the way.
    """
    own = net.state_dict()
    state = unwrap(file.state, own)
    drop = tuple(f"{prefix}." for prefix in (*CLASSIFIERS, *classifiers))
    problems = compare(own, state, drop)
    if problems and convert is not None:
        try:
            converted = convert(dict(state), net)
        except Exception:  # on any format but its own it may fail in any way; then what is told is the direct match
            converted = state
        if not compare(own, converted, drop):
            state, problems = converted, []
    if problems:
        raise InputError(
            f"weights file {file.path} does not fit backbone {name}: {'; '.join(problems)}; give the backbone, the "
            f"options (--backbone-set) and the image channels that these weights were trained with"
        )
    net.load_state_dict({key: state.get(key, value) for key, value in own.items()})


def unwrap(state: State, own: Mapping[str, Tensor]) -> State:
    """Take the network out of what was saved around it. Where some keys have a wrapper's prefix, the others belong to
    other parts: projection heads, momentum copies, classifiers."""
    for prefix in WRAPPERS:
        inside = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if inside and not any(key.startswith(prefix) for key in own):
            return unwrap(inside, own)
    return state


def compare(own: Mapping[str, Tensor], state: State, drop: tuple[str, ...]) -> list[str]:
    """What is in the way of loading `state`, in up to three phrases; empty if it fits. Counters of batches may lack."""
    missing = [repr(key) for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [repr(key) for key in state if key not in own and not key.startswith(drop)]
    shapes = [
        f"{key!r} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    phrases = (("it lacks ", missing), ("it has the unexpected ", unexpected), ("", shapes))
    return [
        start + ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
        for start, items in phrases
        if items
    ]
