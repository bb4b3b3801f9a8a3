"""The weights of a trained clip-small as a file: float16 safetensors, with what they were trained on."""

from pathlib import Path

import torch

from clbench.atomic import atomic_write_bytes
from clbench.backbones.clip_model import ClipBackbone
from clbench.backbones.clip_small import vocabulary_digest

__all__ = ["export"]


def export(model: ClipBackbone, collections: tuple[str, ...], path: Path) -> int:
    """Write the file; returns its size in bytes. collections: image collections (`ImageStore.images_of`) trained on."""
    from safetensors.torch import save

    state = {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in model.net.state_dict().items()}
    content = save(state, {"pretrained_on": ",".join(collections), "vocabulary": vocabulary_digest(), "format": "pt"})
    atomic_write_bytes(path, content)
    return len(content)
