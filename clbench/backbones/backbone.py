"""The module that methods get: a network from images to features, with where it comes from."""

import hashlib

import torch
from torch import Tensor, nn

__all__ = ["Backbone", "fingerprint"]


class Backbone(nn.Module):
    """(B, C, H, W) float32 images -> (B, num_features) features. Made by `clbench.backbones.build`.

    name: full name, of timm's with the tag that was resolved.
    in_shape: (C, H, W) it was built for.
    num_features: D.
    pretrained_on: tags of image collections (`clbench.backbones.provenance`); empty if it starts from random weights.
    native_view: the pipeline its weights were trained for, as view text, or None.
    fingerprint: sha256 of the initial state and of the options that shape the function.
    """

    num_features: int
    fingerprint: str

    def __init__(
        self,
        net: nn.Module,
        *,
        name: str,
        identity: str,
        in_shape: tuple[int, int, int],
        pretrained_on: tuple[str, ...] = (),
        native_view: str | None = None,
        class_token: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.name = name
        self.identity = identity
        self.in_shape = in_shape
        self.pretrained_on = pretrained_on
        self.native_view = native_view
        self.class_token = class_token

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor
        if self.class_token:
            out = self.net.forward_features(images)[:, 0]  # type: ignore[operator]  # the factory checked that it has it
        else:
            out = self.net(images)
        return out

    def extra_repr(self) -> str:
        return f"{self.name}, {self.in_shape} -> {self.num_features}"


def fingerprint(module: nn.Module) -> str:
    """sha256 (hex) over the identity (name and options, if it has one) and every tensor of the state as it is now."""
    digest = hashlib.sha256(str(getattr(module, "identity", type(module).__qualname__)).encode())
    for key, value in sorted(module.state_dict().items()):
        data = value.detach().cpu().contiguous()
        digest.update(f"\n{key} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
