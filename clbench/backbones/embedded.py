"""The built-in backbones (`catalogue.py` has their table): PyTorch's default initialisation, no classifier."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.backbones.catalogue import EMBEDDED
from clbench.backbones.sharp_networks import mnistlike, vgg_small
from clbench.errors import InputError, unknown_name

__all__ = ["BasicBlock", "SmallResNet18", "make_embedded"]

Shape = tuple[int, int, int]


def make_embedded(name: str, in_shape: Shape, options: Mapping[str, object]) -> nn.Module:
    """Build `name` for (C, H, W) images; draws from torch's default generator. Raises InputError for a bad option."""
    numbers: dict[str, int] = {}
    words: dict[str, str] = {}
    declared = EMBEDDED[name].options
    for key in options:
        if key not in declared:
            raise unknown_name(f"option of backbone {name}", key, declared)
    for key, default in declared.items():
        value = options.get(key, default if isinstance(default, int) else default[0])
        if isinstance(default, tuple):
            if value not in default:
                raise unknown_name(f"{key} of backbone {name}", str(value), default)
            words[key] = str(value)
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"option {key} of backbone {name} must be a whole number above 0, not {value!r}")
        else:
            numbers[key] = value
    if name == "flatten":
        return nn.Flatten()
    if name == "mlp":
        return mlp(in_shape, **numbers)
    if name == "mlp-300-100":
        return mlp_300_100(in_shape)
    if name == "vit-tiny-32":
        return vision_transformer(in_shape, **numbers)
    if name == "mnistlike":
        return mnistlike(in_shape, **numbers)
    if name == "vgg-small":
        return vgg_small(in_shape, **numbers)
    return SmallResNet18(in_shape[0], numbers["nf"], words["pool"])


def mlp(in_shape: Shape, width: int, depth: int) -> nn.Sequential:
    """flatten, then `depth` times Linear and ReLU; D = width."""
    layers: list[nn.Module] = [nn.Flatten()]
    inputs = in_shape[0] * in_shape[1] * in_shape[2]
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers)


def mlp_300_100(in_shape: Shape) -> nn.Sequential:
    """flatten, Linear to 300, ReLU, Linear to 100, ReLU, without biases; D = 100."""
    inputs = in_shape[0] * in_shape[1] * in_shape[2]
    hidden = nn.Linear(inputs, 300, bias=False), nn.ReLU(), nn.Linear(300, 100, bias=False), nn.ReLU()
    return nn.Sequential(nn.Flatten(), *hidden)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to the shortcut; ReLU after the sum. The shortcut is the identity, or
    a 1x1 convolution with batch norm where stride or width changes."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class SmallResNet18(nn.Module):
    """ResNet-18 for small images: 3x3 stem with stride 1, no max-pool; widths nf, 2nf, 4nf, 8nf, strides 1, 2, 2, 2.

    pool `avg4`: 4x4 windows with stride 4, then flattened: D = 8nf at 32 px, 4 * 8nf at 64 and 84 px (rows and columns
    that fill no window are dropped, as in the original); a map below 4 pixels (images below 25 px) is pooled whole.
    pool `global`: over the whole map, D = 8nf at any size.
    Source: online_baselines card, section 1.
    """

    def __init__(self, channels: int, nf: int, pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.conv1 = nn.Conv2d(channels, nf, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(nf)
        blocks: list[nn.Module] = []
        inputs = nf
        for width, stride in ((nf, 1), (2 * nf, 2), (4 * nf, 2), (8 * nf, 2)):
            blocks += [BasicBlock(inputs, width, stride), BasicBlock(width, width, 1)]
            inputs = width
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        if self.pool == "global":
            return x.mean((2, 3))
        return torch.flatten(F.avg_pool2d(x, (min(4, x.shape[2]), min(4, x.shape[3]))), 1)


def vision_transformer(in_shape: Shape, patch: int, width: int, depth: int, heads: int) -> nn.Module:
    """timm's VisionTransformer with a class token, whose normalised state is the feature; D = width."""
    from timm.models.vision_transformer import VisionTransformer

    channels, height, side = in_shape
    if height % patch or side % patch:
        raise InputError(
            f"backbone vit-tiny-32 cuts images into {patch} px patches, which {height} x {side} px is no multiple of; "
            f"resize in the view, or give --backbone-set patch=N"
        )
    if width % heads:
        raise InputError(f"backbone vit-tiny-32 needs a width that its heads divide, not {width} for {heads} heads")
    net: nn.Module = VisionTransformer(
        img_size=(height, side), patch_size=patch, in_chans=channels, num_classes=0, global_pool="token",
        class_token=True, embed_dim=width, depth=depth, num_heads=heads, mlp_ratio=4.0, qkv_bias=True, weight_init="",
    )  # fmt: skip
    return net
