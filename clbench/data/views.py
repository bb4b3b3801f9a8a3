"""Views: batched image pipelines written as one line of text, such as `pad_crop(4) flip normalize(cifar100)`.

Everything is tensor code over the whole batch, on the device of the images, without a host read. Nothing random comes
from anywhere but the generator that is passed in.

Draw layout: a view with D draws per image takes exactly one `torch.rand((B, D), generator=rng)`; row b belongs to image
b, and the operations take their columns from left to right in the order they stand in the text (each class below says
what its columns mean). A view without random operations never touches the generator.

Pixels are uint8 until an operation has to compute with them, then float32 in [0, 1]; the result is always float32.
`normalize` and `scale` leave [0, 1], so whatever works on pixel values stands before them.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from clbench.data.catalogue import normalisation
from clbench.errors import InputError, unknown_name

__all__ = ["OPERATIONS", "View", "parse_view", "resample_weights", "to_unit"]

Shape = tuple[int, int, int]  # (C, H, W)
Mode = Literal["bilinear", "bicubic"]
Range = tuple[float, float]  # written low:high


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]; floating point images pass as they are."""
    return images if images.is_floating_point() else images / 255


class Operation:
    """One step of a view: `(B, C, H, W)` uint8 or float32 -> the same kind. u: (B, draws) uniform in [0, 1)."""

    draws: ClassVar[int] = 0
    in_unit_range: ClassVar[bool] = True  # works on [0, 1], so it may not stand behind normalize or scale
    leaves_unit_range: ClassVar[bool] = False

    def output_shape(self, shape: Shape) -> Shape:
        """(C, H, W) that comes out for (C, H, W); raises InputError if such images cannot be taken."""
        return shape

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        raise NotImplementedError


# -- geometry --------------------------------------------------------------------------------------------------------
def crop(x: Tensor, top: Tensor, left: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut a window of `size` (h, w) out of each image at its own (B,) int64 `top` and `left`."""
    batch, channels, height, width = x.shape
    start = (top * width + left)[:, None] + window(size, width, x.device)
    pixels = x.reshape(batch, channels, height * width).gather(2, start[:, None].expand(-1, channels, -1))
    return pixels.view(batch, channels, *size)


@lru_cache(maxsize=64)
def window(size: tuple[int, int], width: int, device: torch.device) -> Tensor:
    """(h * w,) int64 places of an h x w window's pixels in an image of that width, from its top left pixel; kept."""
    return (torch.arange(size[0])[:, None] * width + torch.arange(size[1])).reshape(-1).to(device)


def scaled(u: Tensor, count: int | Tensor) -> Tensor:
    """Uniform [0, 1) -> uniform integers 0..count-1, int64."""
    return (u * count).long()


@dataclass(frozen=True)
class PadCrop(Operation):
    """`pad_crop(padding[,fill])`: pad with grey level `fill` (0..255), then cut a random window of the old size.

    Draws 2: top, left (uniform integers 0..2*padding). torchvision: RandomCrop(size, padding, fill).
    """

    padding: int = field(metadata={"low": 0})
    fill: float = field(default=0.0, metadata={"low": 0, "high": 255})
    draws: ClassVar[int] = 2

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        height, width = x.shape[2:]
        fill = self.fill / 255 if x.is_floating_point() else self.fill
        padded = F.pad(x, (self.padding,) * 4, value=fill)
        at = scaled(u, 2 * self.padding + 1)
        return crop(padded, at[:, 0], at[:, 1], (height, width))


@dataclass(frozen=True)
class Flip(Operation):
    """`flip[(p)]`: mirror left-right with probability p. Draws 1: flipped if u < p.
    torchvision: RandomHorizontalFlip(p)."""

    p: float = field(default=0.5, metadata={"low": 0, "high": 1})
    draws: ClassVar[int] = 1
    in_unit_range: ClassVar[bool] = False

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        width = x.shape[3]
        column = torch.arange(width, device=x.device)
        source = torch.where(u < self.p, width - 1 - column, column)  # a gather is quicker than mirroring and choosing
        return x.gather(3, source[:, None, None].expand(x.shape))


@dataclass(frozen=True)
class CenterCrop(Operation):
    """`center_crop(size)`: the middle size x size window. torchvision: CenterCrop."""

    size: int = field(metadata={"low": 1})
    in_unit_range: ClassVar[bool] = False

    def output_shape(self, shape: Shape) -> Shape:
        return square_inside(shape, self.size, "center_crop")

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        top, left = (round((side - self.size) / 2) for side in x.shape[2:])
        return x[:, :, top : top + self.size, left : left + self.size]


@dataclass(frozen=True)
class RandomCrop(Operation):
    """`random_crop(size)`: a random size x size window. Draws 2: top, left. torchvision: RandomCrop(size)."""

    size: int = field(metadata={"low": 1})
    draws: ClassVar[int] = 2
    in_unit_range: ClassVar[bool] = False

    def output_shape(self, shape: Shape) -> Shape:
        return square_inside(shape, self.size, "random_crop")

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        height, width = x.shape[2:]
        top, left = scaled(u[:, 0], height - self.size + 1), scaled(u[:, 1], width - self.size + 1)
        return crop(x, top, left, (self.size, self.size))


def square_inside(shape: Shape, size: int, name: str) -> Shape:
    channels, height, width = shape
    if size > min(height, width):
        raise InputError(f"{name}({size}) is larger than the {height}x{width} images; resize them first")
    return channels, size, size


# -- resampling ------------------------------------------------------------------------------------------------------
def resample_weights(start: Tensor, length: Tensor, size: int, out: int, mode: Mode) -> Tensor:
    """Antialiased resampling of the pixels `start .. start + length - 1` of a line of `size` pixels to `out` pixels.

    start, length: (B,) float64 whole numbers. Returns (B, out, size) float32, rows sum to 1: result = weights @ line.
    The filter (triangle; Keys' cubic with a = -0.5) widens with the scale and is cut off at the ends of the piece, as
    in PIL and in torch's antialiased interpolation.
    """
    scale = (length / out)[:, None, None]
    centre = start[:, None, None] + scale * (torch.arange(out, device=start.device, dtype=start.dtype)[:, None] + 0.5)
    pixel = torch.arange(size, device=start.device, dtype=start.dtype)
    x = ((pixel + 0.5 - centre) / scale.clamp(min=1)).abs()
    if mode == "bilinear":
        weight = (1 - x).clamp(min=0)
    else:
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        weight = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    begin = start[:, None, None]
    weight = weight * ((pixel >= begin) & (pixel < begin + length[:, None, None]))
    return (weight / weight.sum(2, keepdim=True)).to(torch.float32)


def resample(x: Tensor, rows: Tensor, columns: Tensor, mode: Mode) -> Tensor:
    """Apply (B or 1, h, H) and (B or 1, w, W) weights to (B, C, H, W) images -> (B, C, h, w) float32 in [0, 1]. Bicubic
    weights overshoot; like any pipeline that goes through 8-bit images, the result is cut to [0, 1]."""
    x = to_unit(x)
    wide = x @ columns[0].T if len(columns) == 1 else x @ columns.mT[:, None]
    out = rows[:, None] @ wide
    return out.clamp_(0, 1) if mode == "bicubic" else out


@lru_cache(maxsize=64)
def whole_line_weights(size: int, out: int, mode: Mode, device: torch.device) -> Tensor:
    """(1, out, size) weights for resampling whole lines, kept per device."""
    one = torch.ones(1, dtype=torch.float64)
    return resample_weights(0 * one, size * one, size, out, mode).to(device)


def resize_to(x: Tensor, height: int, width: int, mode: Mode) -> Tensor:
    """(B, C, H, W) -> (B, C, height, width), antialiased; unchanged if it has that size already."""
    if x.shape[2:] == (height, width):
        return x
    rows = whole_line_weights(x.shape[2], height, mode, x.device)
    columns = whole_line_weights(x.shape[3], width, mode, x.device)
    return resample(x, rows, columns, mode)


@dataclass(frozen=True)
class Resize(Operation):
    """`resize(size[,bilinear|bicubic])`: to size x size exactly, antialiased. torchvision: Resize((size, size))."""

    size: int = field(metadata={"low": 1})
    mode: Mode = "bilinear"

    def output_shape(self, shape: Shape) -> Shape:
        return shape[0], self.size, self.size

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        return resize_to(x, self.size, self.size, self.mode)


@dataclass(frozen=True)
class ResizeShort(Operation):
    """`resize_short(size[,bilinear|bicubic])`: the short side to `size`, shape kept. torchvision: Resize(size)."""

    size: int = field(metadata={"low": 1})
    mode: Mode = "bilinear"

    def output_shape(self, shape: Shape) -> Shape:
        channels, height, width = shape
        short = min(height, width)
        return channels, int(self.size * height / short), int(self.size * width / short)

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        _, height, width = self.output_shape((x.shape[1], x.shape[2], x.shape[3]))
        return resize_to(x, height, width, self.mode)


@dataclass(frozen=True)
class RandomResizedCrop(Operation):
    """`random_resized_crop(size[,bilinear|bicubic][,scale=0.08:1][,ratio=0.75:1.3333333333333333])`: a random box of
    each image, resampled to size x size.

    A box's area is a share of the image drawn from `scale`, its width over height is log-uniform in `ratio`, both sides
    rounded to whole pixels; the first of ten tries that fits is taken, else the largest central box with an allowed
    ratio. Draws 22: for each try area and ratio, then top, left. torchvision: RandomResizedCrop.
    """

    size: int = field(metadata={"low": 1})
    mode: Mode = "bilinear"
    scale: Range = field(default=(0.08, 1.0), metadata={"low": 1e-6, "high": 1})
    ratio: Range = field(default=(3 / 4, 4 / 3), metadata={"low": 1e-3, "high": 1e3})
    tries: ClassVar[int] = 10
    draws: ClassVar[int] = 2 * tries + 2

    def output_shape(self, shape: Shape) -> Shape:
        return shape[0], self.size, self.size

    def boxes(self, u: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, 22) draws -> top, left, height, width of each image's box, (B,) whole numbers in the dtype of u."""
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * u[:, 0 : 2 * self.tries : 2])
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        ratio = torch.exp(low + (high - low) * u[:, 1 : 2 * self.tries : 2])
        w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        first = fits.to(torch.uint8).argmax(1, keepdim=True)  # 0 if none fits
        found = fits.gather(1, first)[:, 0]
        spare_h, spare_w = height, width
        if width / height < self.ratio[0]:
            spare_h = round(width / self.ratio[0])
        elif width / height > self.ratio[1]:
            spare_w = round(height * self.ratio[1])
        h = torch.where(found, h.gather(1, first)[:, 0], spare_h)
        w = torch.where(found, w.gather(1, first)[:, 0], spare_w)
        top = torch.where(found, (u[:, -2] * (height - h + 1)).floor(), (height - spare_h) // 2)
        left = torch.where(found, (u[:, -1] * (width - w + 1)).floor(), (width - spare_w) // 2)
        return top, left, h, w

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        height, width = x.shape[2:]
        top, left, h, w = self.boxes(u.to(torch.float64), height, width)
        rows = resample_weights(top, h, height, self.size, self.mode)
        columns = resample_weights(left, w, width, self.size, self.mode)
        return resample(x, rows, columns, self.mode)


# -- colour ----------------------------------------------------------------------------------------------------------
def luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 1, H, W), ITU-R 601 weights as torchvision has them; grey images pass."""
    return x if x.shape[1] == 1 else (x[:, 0:1] * 0.2989).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:3], alpha=0.114)


def blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    return (factor * x + (1 - factor) * other).clamp_(0, 1)


def turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Shift the hue of (B, 3, H, W) in [0, 1] by `turn` (B, 1, 1, 1) of a full circle, through HSV."""
    red, green, blue = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    value, top = x.max(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    saturation = chroma / value.clamp(min=1e-12)
    safe = chroma.clamp(min=1e-12)
    sector = torch.where(
        top == 0, (green - blue) / safe, torch.where(top == 1, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    )
    hue = torch.where(chroma > 0, sector / 6, 0) + turn
    k = (torch.tensor((5.0, 3.0, 1.0), device=x.device).view(1, 3, 1, 1) + hue * 6) % 6
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)


def factors(u: Tensor, amount: float) -> Tensor:
    """(B,) uniform -> (B, 1, 1, 1) factors in [max(0, 1 - amount), 1 + amount]."""
    low = max(0.0, 1 - amount)
    return (low + (1 + amount - low) * u)[:, None, None, None]


@dataclass(frozen=True)
class Brightness(Operation):
    """`brightness(amount)`: times a factor in [max(0, 1 - amount), 1 + amount], cut to [0, 1]. Draws 1: the factor.
    torchvision: ColorJitter(brightness=amount)."""

    amount: float = field(metadata={"low": 0})
    draws: ClassVar[int] = 1

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        return (to_unit(x) * factors(u[:, 0], self.amount)).clamp_(0, 1)


@dataclass(frozen=True)
class ColorJitter(Operation):
    """`color_jitter(brightness[,contrast[,saturation[,hue]]][,p=1])`: with probability p, each in a random order of its
    own per image. Amounts of 0 are left out; let m be the number of the others. On grey images only brightness and
    contrast act.

    Draws 1 + 2m: applied if u < p; m factors in the order above (hue: uniform in [-hue, hue] turns); m sort keys, the
    smallest acts first. torchvision: RandomApply([ColorJitter(...)], p).
    """

    brightness: float = field(metadata={"low": 0})
    contrast: float = field(default=0.0, metadata={"low": 0})
    saturation: float = field(default=0.0, metadata={"low": 0})
    hue: float = field(default=0.0, metadata={"low": 0, "high": 0.5})
    p: float = field(default=1.0, metadata={"low": 0, "high": 1})

    @cached_property
    def parts(self) -> list[tuple[str, float]]:
        names = ("brightness", "contrast", "saturation", "hue")
        return [(name, getattr(self, name)) for name in names if getattr(self, name) > 0]

    @property
    def draws(self) -> int:  # type: ignore[override]  # depends on the amounts here
        return 1 + 2 * len(self.parts)

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        x = plain = to_unit(x)
        m = len(self.parts)
        order = u[:, 1 + m :].argsort(dim=1, stable=True)
        for slot in range(
            m
        ):  # every part is computed in every slot: which image takes which is known on the device only
            done = x
            for index, (name, amount) in enumerate(self.parts):
                changed = self.change(name, x, u[:, 1 + index], amount)
                done = torch.where((order[:, slot] == index)[:, None, None, None], changed, done)
            x = done
        return torch.where((u[:, 0] < self.p)[:, None, None, None], x, plain)

    @staticmethod
    def change(name: str, x: Tensor, u: Tensor, amount: float) -> Tensor:
        if name == "brightness":
            return blend(x, 0.0, factors(u, amount))
        if name == "contrast":
            return blend(x, luma(x).mean((1, 2, 3), keepdim=True), factors(u, amount))
        if x.shape[1] == 1:
            return x
        if name == "saturation":
            return blend(x, luma(x), factors(u, amount))
        return turn_hue(x, ((2 * u - 1) * amount)[:, None, None, None])


@dataclass(frozen=True)
class Gray(Operation):
    """`gray(p)`: to grey with probability p, channels kept. Draws 1: grey if u < p. torchvision: RandomGrayscale(p)."""

    p: float = field(metadata={"low": 0, "high": 1})
    draws: ClassVar[int] = 1

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        x = to_unit(x)
        return torch.where((u < self.p)[:, :, None, None], luma(x), x)


@dataclass(frozen=True)
class Rgb(Operation):
    """`rgb`: repeat the one channel of grey images three times; colour images pass."""

    in_unit_range: ClassVar[bool] = False

    def output_shape(self, shape: Shape) -> Shape:
        return 3, shape[1], shape[2]

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1).contiguous()


# -- value range -----------------------------------------------------------------------------------------------------
class Affine(Operation):
    """x in [0, 1] -> x * gain + offset, per channel; fused with the division by 255 for uint8."""

    leaves_unit_range: ClassVar[bool] = True

    def constants(self) -> tuple[list[float], list[float]]:
        """gain and offset, one or C numbers each."""
        raise NotImplementedError

    @cached_property
    def on_device(self) -> dict[tuple[torch.device, bool], tuple[Tensor, Tensor]]:
        return {}

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        from_bytes = not x.is_floating_point()
        key = (x.device, from_bytes)
        if key not in self.on_device:
            gain, offset = (torch.tensor(part, dtype=torch.float64).view(1, -1, 1, 1) for part in self.constants())
            gain = gain / 255 if from_bytes else gain
            self.on_device[key] = gain.to(x.device, torch.float32), offset.to(x.device, torch.float32)
        gain, offset = self.on_device[key]
        if len(gain[0]) > x.shape[1]:  # grey images, three constants
            return x * gain + offset
        return x.to(torch.float32).mul_(gain).add_(offset) if from_bytes else (x * gain).add_(offset)


@dataclass(frozen=True)
class Normalize(Affine):
    """`normalize(name)` or `normalize(means...,stds...)`: (x - mean) / std per channel, with one number or one per
    channel each. Names are those of data sets, and `imagenet`, `clip`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def output_shape(self, shape: Shape) -> Shape:
        if len(self.mean) not in (1, shape[0]):
            raise InputError(
                f"normalize has {len(self.mean)} means but the images have {shape[0]} channel(s); "
                f"put rgb before it, or give one mean and one std per channel"
            )
        return shape

    def constants(self) -> tuple[list[float], list[float]]:
        return [1 / s for s in self.std], [-m / s for m, s in zip(self.mean, self.std, strict=True)]


@dataclass(frozen=True)
class Scale(Affine):
    """`scale(low,high)`: [0, 1] -> [low, high]."""

    low: float
    high: float

    def constants(self) -> tuple[list[float], list[float]]:
        return [self.high - self.low], [self.low]


# -- the view --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class View:
    """A parsed pipeline. `view(images, rng)`: (B, C, H, W) uint8 -> (B, C, h, w) float32; see the module's docstring.

    random: whether it needs a generator. draws: uniform numbers per image.
    """

    text: str
    operations: tuple[Operation, ...]

    @cached_property
    def draws(self) -> int:
        return sum(operation.draws for operation in self.operations)

    @property
    def random(self) -> bool:
        return self.draws > 0

    def output_shape(self, shape: Shape) -> Shape:
        """(C, h, w) for images of (C, H, W). Raises InputError if the pipeline cannot take such images."""
        for operation in self.operations:
            try:
                shape = operation.output_shape(shape)
            except InputError as error:
                raise InputError(f"view {self.text!r}: {error}") from None
        return shape

    def __call__(self, images: Tensor, rng: torch.Generator | None = None) -> Tensor:
        if self.draws and rng is None:
            raise ValueError(f"view {self.text!r} is random and needs a generator: pass rng")
        u = torch.rand((len(images), self.draws), generator=rng, device=images.device) if self.draws else images
        x, column = images, 0
        for operation in self.operations:
            x = operation(x, u[:, column : column + operation.draws] if operation.draws else u)
            column += operation.draws
        return to_unit(x)


OPERATIONS: Mapping[str, type[Operation]] = {
    "pad_crop": PadCrop,
    "flip": Flip,
    "center_crop": CenterCrop,
    "random_crop": RandomCrop,
    "resize": Resize,
    "resize_short": ResizeShort,
    "random_resized_crop": RandomResizedCrop,
    "brightness": Brightness,
    "color_jitter": ColorJitter,
    "gray": Gray,
    "rgb": Rgb,
    "normalize": Normalize,
    "scale": Scale,
}
STEP = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\(([^()]*)\))?(?=\s|$)")


@lru_cache(maxsize=256)
def parse_view(text: str) -> View:
    """Read a pipeline: operations separated by spaces, arguments in brackets (`name(value,key=value)`); see the classes
    above. The empty text is the plain image, divided by 255. Raises InputError: the place, and what would be valid."""
    operations: list[Operation] = []
    position, text = 0, text.strip()
    while position < len(text):
        match = STEP.match(text, position)
        if match is None:
            raise InputError(
                f"view {text!r} cannot be read at {text[position:].strip()!r}; "
                f"write operations separated by spaces, like 'pad_crop(4) flip normalize(cifar100)'"
            )
        name, arguments = match[1], [part.strip() for part in (match[2] or "").split(",")]
        if name not in OPERATIONS:
            raise unknown_name("view operation", name, OPERATIONS, hint=f"(in view {text!r})")
        try:
            operation = build(name, [part for part in arguments if part])
            if operation.in_unit_range and any(done.leaves_unit_range for done in operations):
                raise InputError(f"{name} works on pixels in [0, 1]: put it before normalize or scale")
        except InputError as error:
            raise InputError(f"view {text!r}: {error}") from None
        operations.append(operation)
        position = match.end()
    return View(text, tuple(operations))


def build(name: str, arguments: list[str]) -> Operation:
    """One operation from its name and the texts of its arguments."""
    if name == "normalize":
        return build_normalize(arguments)
    kind = OPERATIONS[name]
    declared = fields(kind)  # type: ignore[arg-type]  # all operations but the bases are dataclasses
    usage = f"{name}({','.join(item.name for item in declared)})" if declared else name
    values: dict[str, Any] = {}
    for index, argument in enumerate(arguments):
        key, has_key, value = argument.partition("=")
        if not has_key:
            if index >= len(declared):
                raise InputError(f"{name} has too many arguments; it is {usage}")
            key, value = declared[index].name, argument
        item = next((item for item in declared if item.name == key.strip()), None)
        if item is None:
            raise InputError(f"{name} has no argument {key.strip()!r}; it is {usage}")
        if item.name in values:
            raise InputError(f"{name} is given {item.name} twice; it is {usage}")
        values[item.name] = convert(f"{name}'s {item.name}", value.strip(), item.type, item.metadata)
    for item in declared:
        if item.default is MISSING and item.name not in values:
            raise InputError(f"{name} needs {item.name}; it is {usage}")
    return kind(**values)


def convert(what: str, text: str, kind: Any, limits: Mapping[str, float]) -> Any:
    """Text -> int, float, low:high or one of a Literal's words, inside the declared limits."""
    if kind == Mode:
        if text not in get_args(Mode):
            raise InputError(f"{what} must be {' or '.join(get_args(Mode))}, not {text!r}")
        return text
    read: Callable[[str], Any] = int if kind is int else finite
    wanted = {int: "a whole number", float: "a number"}.get(kind, "two numbers low:high")
    try:
        value = tuple(read(part) for part in text.split(":"))
        if len(value) != (2 if kind == Range else 1) or list(value) != sorted(value):
            raise ValueError
    except ValueError:
        raise InputError(f"{what} must be {wanted}, not {text!r}") from None
    low, high = limits.get("low", -math.inf), limits.get("high", math.inf)
    if not all(low <= part <= high for part in value):
        span = f"between {low:g} and {high:g}" if math.isfinite(high) else f"at least {low:g}"
        raise InputError(f"{what} must be {span}, not {text}")
    return value if kind == Range else value[0]


def finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def build_normalize(arguments: list[str]) -> Normalize:
    """`normalize(name)` or an even count of numbers: first the means, then the stds."""
    if len(arguments) == 1:
        return Normalize(*normalisation(arguments[0]))
    try:
        numbers = tuple(finite(argument) for argument in arguments)
    except ValueError:
        numbers = ()
    half = len(numbers) // 2
    if half not in (1, 3) or len(numbers) % 2:
        raise InputError(
            f"normalize takes the name of a data set, or one mean and std, or three means and three stds; "
            f"not {','.join(arguments)!r}"
        )
    if min(numbers[half:]) <= 0:
        raise InputError(f"normalize needs stds above 0, not {', '.join(f'{value:g}' for value in numbers[half:])}")
    return Normalize(numbers[:half], numbers[half:])
