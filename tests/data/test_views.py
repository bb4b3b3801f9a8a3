"""Views: torchvision's pixels on the same draws, draws from the generator alone, no host reads, clear errors."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clbench.data.views import OPERATIONS, ColorJitter, RandomResizedCrop, View, parse_view, resample_weights
from clbench.errors import InputError
from clbench.rng import generator

transforms = pytest.importorskip("torchvision.transforms.v2")
functional = pytest.importorskip("torchvision.transforms.v2.functional")
MODES = {"bilinear": functional.InterpolationMode.BILINEAR, "bicubic": functional.InterpolationMode.BICUBIC}

ALL = (
    "pad_crop(4) flip normalize(cifar100)", "pad_crop(2,128) scale(-1,1)", "random_crop(20)", "center_crop(20)", "rgb",
    "resize(48,bicubic) center_crop(40) normalize(0.5,0.5)", "resize_short(24)", "random_resized_crop(28,bicubic)",
    "brightness(0.247)", "color_jitter(0.4,0.4,0.4,0.1,p=0.8) gray(0.2)", "flip(0.3)", "",
    "random_resized_crop(32,scale=0.2:1) flip color_jitter(0.4,0.4) normalize(0.5,0.4,0.3,0.2,0.1,0.3)",
)  # fmt: skip


def pictures(batch: int = 8, channels: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """uint8 images with both smooth parts and noise."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand((batch, channels, 5, 5), generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    noise = torch.rand((batch, channels, height, width), generator=rng)
    return ((0.7 * smooth + 0.3 * noise) * 255).round().to(torch.uint8)


def draws(view: View, batch: int, seed: int = 1) -> Tensor:
    """What the view is documented to draw."""
    return torch.rand((batch, view.draws), generator=torch.Generator().manual_seed(seed))


def run(view: View, images: Tensor, seed: int = 1) -> Tensor:
    return view(images, torch.Generator().manual_seed(seed))


# -- parity with torchvision ------------------------------------------------------------------------------------------
def test_plain_view_is_to_dtype() -> None:
    images = pictures()
    expected = functional.to_dtype(images, torch.float32, scale=True)
    torch.testing.assert_close(parse_view("")(images), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalize(channels: int) -> None:
    images = pictures(channels=channels)
    mean, std = [0.5071, 0.4865, 0.4409][:channels], [0.2673, 0.2564, 0.2762][:channels]
    text = ",".join(map(str, mean + std))
    expected = functional.normalize(functional.to_dtype(images, torch.float32, scale=True), mean, std)
    torch.testing.assert_close(parse_view(f"normalize({text})")(images), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(parse_view("scale(-1,1)")(images), images.float() / 255 * 2 - 1, atol=1e-6, rtol=0)


@pytest.mark.parametrize("fill", [0, 128])
@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_pad_crop(fill: int, shape: tuple[int, int]) -> None:
    images = pictures(height=shape[0], width=shape[1])
    view = parse_view(f"pad_crop(4,{fill})")
    at = (draws(view, len(images)) * 9).long()
    assert len(at.unique()) > 3
    padded = functional.pad(images, [4], fill=fill)
    expected = [functional.crop(p, int(t), int(left), *shape) for p, (t, left) in zip(padded, at, strict=True)]
    assert torch.equal(run(view, images), torch.stack(expected).float() / 255)
    torch.testing.assert_close(run(view, images.float() / 255), torch.stack(expected).float() / 255)


def test_flip() -> None:
    images = pictures(height=24)
    view = parse_view("flip")
    chosen = draws(view, len(images))[:, 0] < 0.5
    assert 0 < chosen.sum() < len(images)
    expected = [functional.horizontal_flip(i) if c else i for i, c in zip(images, chosen, strict=True)]
    assert torch.equal(run(view, images), torch.stack(expected).float() / 255)
    assert torch.equal(run(parse_view("flip(1)"), images), functional.horizontal_flip(images).float() / 255)
    assert torch.equal(run(parse_view("flip(0)"), images), images.float() / 255)


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 24), (33, 40, 20), (25, 30, 20), (20, 20, 20)])
def test_crops(height: int, width: int, size: int) -> None:
    images = pictures(height=height, width=width)
    middle = parse_view(f"center_crop({size})")(images)
    assert torch.equal(middle, functional.center_crop(images, [size]).float() / 255)
    view = parse_view(f"random_crop({size})")
    u = draws(view, len(images))
    expected = [
        functional.crop(image, int(a * (height - size + 1)), int(b * (width - size + 1)), size, size)
        for image, (a, b) in zip(images, u.tolist(), strict=True)
    ]
    assert torch.equal(run(view, images), torch.stack(expected).float() / 255)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 48), (7, 90)])
@pytest.mark.parametrize("size", [32, 128, 20])
def test_resize(mode: str, height: int, width: int, size: int) -> None:
    images = pictures(4, height=height, width=width)
    for view, target in ((f"resize({size},{mode})", [size, size]), (f"resize_short({size},{mode})", [size])):
        ours = parse_view(view)(images)
        real = functional.resize(images.float() / 255, target, interpolation=MODES[mode], antialias=True)
        assert ours.shape == real.shape
        torch.testing.assert_close(ours, real.clamp(0, 1), atol=1e-5, rtol=0)
        levels = functional.resize(images, target, interpolation=MODES[mode], antialias=True)
        assert ((ours * 255).round() - levels.float()).abs().max() <= 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (32, 32, 224), (64, 48, 24)])
def test_random_resized_crop_is_exact_for_each_box(mode: str, height: int, width: int, size: int) -> None:
    images = pictures(16, height=height, width=width)
    view = parse_view(f"random_resized_crop({size},{mode})")
    (operation,) = view.operations
    assert isinstance(operation, RandomResizedCrop)
    boxes = torch.stack(operation.boxes(draws(view, 16).double(), height, width), 1).long().tolist()
    assert len(set(map(tuple, boxes))) > 8
    ours = run(view, images)
    for image, box, result in zip(images, boxes, ours, strict=True):
        options = {"size": [size, size], "interpolation": MODES[mode], "antialias": True}
        real = functional.resized_crop(image.float() / 255, *box, **options)
        torch.testing.assert_close(result, real.clamp(0, 1), atol=1e-5, rtol=0)
        levels = functional.resized_crop(image, *box, **options)
        assert ((result * 255).round() - levels.float()).abs().max() <= 1


@pytest.mark.parametrize(("height", "width", "scale", "ratio"), [
    (32, 32, (0.08, 1.0), (3 / 4, 4 / 3)), (64, 40, (0.2, 1.0), (3 / 4, 4 / 3)), (20, 90, (0.9, 1.0), (3 / 4, 4 / 3)),
])  # fmt: skip
def test_random_resized_crop_boxes_are_distributed_like_torchvisions(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    count = 2000
    view = parse_view(f"random_resized_crop(32,scale={scale[0]}:{scale[1]},ratio={ratio[0]}:{ratio[1]})")
    (operation,) = view.operations
    assert isinstance(operation, RandomResizedCrop)
    top, left, h, w = operation.boxes(draws(view, count).double(), height, width)
    assert bool(((top >= 0) & (left >= 0) & (top + h <= height) & (left + w <= width) & (h > 0) & (w > 0)).all())
    image, reference = torch.zeros(3, height, width), transforms.RandomResizedCrop(32, scale, ratio)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        params = [reference.make_params([image]) for _ in range(count)]
    real = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in params], dtype=torch.float64)
    t_top, t_left, t_h, t_w = real.T
    pairs = ((top, t_top), (left, t_left), (h, t_h), (w, t_w), (h * w, t_h * t_w), (w / h, t_w / t_h))
    for ours, theirs in pairs:
        values = torch.cat([ours, theirs]).sort().values
        distance = (
            torch.searchsorted(ours.sort().values, values, right=True)
            - torch.searchsorted(theirs.sort().values, values, right=True)
        ).abs().max() / count
        assert distance < 1.95 * math.sqrt(2 / count)  # two-sample Kolmogorov-Smirnov, one in a thousand


def test_brightness() -> None:
    images = pictures()
    view = parse_view("brightness(0.5)")
    factors = (0.5 + draws(view, len(images))[:, 0]).tolist()
    expected = [functional.adjust_brightness(i.float() / 255, f) for i, f in zip(images, factors, strict=True)]
    torch.testing.assert_close(run(view, images), torch.stack(expected), atol=1e-6, rtol=0)
    assert float(run(parse_view("brightness(3)"), images).max()) == 1.0


def test_gray() -> None:
    images = pictures()
    view = parse_view("gray(0.5)")
    chosen = draws(view, len(images))[:, 0] < 0.5
    grey = functional.rgb_to_grayscale(images.float() / 255, num_output_channels=3)
    expected = torch.where(chosen[:, None, None, None], grey, images.float() / 255)
    torch.testing.assert_close(run(view, images), expected, atol=1e-6, rtol=0)
    one = pictures(channels=1)
    assert torch.equal(run(view, one), one.float() / 255)


@pytest.mark.parametrize("amounts", [(0.4, 0.4, 0.4, 0.1), (0.4, 0, 0, 0), (0, 0.3, 0, 0.5), (0.9, 0.9, 0.9, 0)])
@pytest.mark.parametrize("p", [1, 0.6])
def test_color_jitter(amounts: tuple[float, float, float, float], p: float) -> None:
    images = pictures(24)
    view = parse_view(f"color_jitter({','.join(map(str, amounts))},p={p})")
    (operation,) = view.operations
    assert isinstance(operation, ColorJitter)
    apply = {
        "brightness": functional.adjust_brightness, "contrast": functional.adjust_contrast,
        "saturation": functional.adjust_saturation, "hue": functional.adjust_hue,
    }  # fmt: skip
    parts = operation.parts
    assert view.draws == 1 + 2 * len(parts)
    orders = set()
    expected = []
    for image, row in zip(images, draws(view, len(images)).tolist(), strict=True):
        x = image.float() / 255
        order = sorted(range(len(parts)), key=lambda part, row=row: row[1 + len(parts) + part])
        orders.add(tuple(order))
        for part in order if row[0] < p else []:
            name, amount = parts[part]
            u = row[1 + part]
            low = max(0.0, 1 - amount)
            factor = (2 * u - 1) * amount if name == "hue" else low + (1 + amount - low) * u
            x = apply[name](x, factor)
        expected.append(x)
    assert len(orders) >= min(math.factorial(len(parts)), 6)
    torch.testing.assert_close(run(view, images), torch.stack(expected), atol=2e-5, rtol=0)


def test_color_jitter_on_grey_images() -> None:
    images = pictures(channels=1)
    both = run(parse_view("color_jitter(0.4,0.4,0.4,0.1)"), images)
    assert both.shape == images.shape
    assert not torch.equal(both, images.float() / 255)


def test_rgb_and_grey_constants() -> None:
    images = pictures(channels=1)
    out = parse_view("rgb normalize(imagenet)")(images)
    expected = functional.normalize(
        images.float().expand(-1, 3, -1, -1) / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)
    out[0, 0] = 0  # three channels of their own memory
    assert float(out[0, 1].abs().max()) > 0
    assert torch.equal(parse_view("rgb")(pictures()), parse_view("")(pictures()))


# -- randomness, purity, devices --------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ALL)
def test_a_view_is_a_pure_function_of_images_and_generator(text: str) -> None:
    view = parse_view(text)
    images = pictures()
    before = images.clone()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = run(view, images)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is touched"
    torch.manual_seed(4)
    assert torch.equal(run(view, images), first)
    assert torch.equal(images, before), "the images are changed"
    assert first.dtype == torch.float32
    assert first.shape[1:] == view.output_shape((3, 32, 32))
    assert first.is_contiguous() or not view.random
    assert view.random == (view.draws > 0) == (not torch.equal(run(view, images, 1), run(view, images, 2)))
    rng = torch.Generator().manual_seed(1)
    view(images, rng)
    reference = torch.Generator().manual_seed(1)
    if view.draws:
        torch.rand((len(images), view.draws), generator=reference)
    assert torch.equal(rng.get_state(), reference.get_state()), "exactly the documented draws"


@pytest.mark.parametrize("text", ALL)
def test_each_image_is_on_its_own(text: str) -> None:
    """Row b of the result depends on image b and its row of draws alone."""
    view = parse_view(text)
    images = pictures()
    first = run(view, images)
    images[3] = 255 - images[3]
    changed = run(view, images)
    keep = torch.arange(len(images)) != 3
    torch.testing.assert_close(changed[keep], first[keep], atol=1e-6, rtol=0)
    assert not torch.equal(changed[3], first[3])


@pytest.mark.parametrize("text", ALL)
def test_no_host_read(text: str) -> None:
    hostreads = pytest.importorskip("clbench.learner.hostreads")
    view = parse_view(text)
    images, rng = pictures(), generator(0, "view")
    view(images, rng)  # constants are made at the first use
    with hostreads.forbid_host_reads():
        view(images, rng)


def test_empty_batches() -> None:
    for text in ALL:
        assert run(parse_view(text), pictures()[:0]).shape[1:] == parse_view(text).output_shape((3, 32, 32))


def test_a_random_view_wants_a_generator() -> None:
    with pytest.raises(ValueError, match="pass rng"):
        parse_view("flip")(pictures())


@given(size=st.integers(1, 40), out=st.integers(1, 60), mode=st.sampled_from(["bilinear", "bicubic"]), data=st.data())
@settings(max_examples=60, deadline=None)
def test_weights_sum_to_one_inside_the_piece(size: int, out: int, mode: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - start))
    weights = resample_weights(
        torch.tensor([start], dtype=torch.float64), torch.tensor([length], dtype=torch.float64), size, out, mode
    )[0]  # type: ignore[arg-type]
    assert weights.shape == (out, size)
    torch.testing.assert_close(weights.sum(1), torch.ones(out))
    outside = torch.cat([weights[:, :start], weights[:, start + length :]], 1)
    assert not outside.any()
    if length == out:
        torch.testing.assert_close(weights[:, start : start + length], torch.eye(out))


# -- the text ---------------------------------------------------------------------------------------------------------
def test_shapes_without_images() -> None:
    assert parse_view("resize(256,bicubic) center_crop(224) normalize(0.5,0.5)").output_shape((3, 32, 32)) == (
        3,
        224,
        224,
    )
    assert parse_view("rgb").output_shape((1, 28, 28)) == (3, 28, 28)
    assert parse_view("resize_short(16)").output_shape((3, 32, 48)) == (3, 16, 24)
    assert parse_view("pad_crop(4)").output_shape((1, 8, 8)) == (1, 8, 8)
    for text, shape, pattern in [
        ("random_crop(40)", (3, 32, 64), r"random_crop\(40\) is larger than the 32x64 images"),
        ("center_crop(9)", (1, 8, 8), r"center_crop\(9\) is larger"),
        ("normalize(cifar100)", (1, 8, 8), r"3 means but the images have 1 channel"),
    ]:
        with pytest.raises(InputError, match=pattern):
            parse_view(text).output_shape(shape)


@pytest.mark.parametrize(("text", "pattern"), [
    ("padcrop(4)", r"unknown view operation 'padcrop'; did you mean 'pad_crop'"),
    ("pad_crop", r"pad_crop needs padding; it is pad_crop\(padding,fill\)"),
    ("pad_crop(x)", r"pad_crop's padding must be a whole number, not 'x'"),
    ("pad_crop(-1)", r"pad_crop's padding must be at least 0, not -1"),
    ("pad_crop(4,300)", r"pad_crop's fill must be between 0 and 255, not 300"),
    ("pad_crop(1,2,3)", r"pad_crop has too many arguments"),
    ("resize(32,lanczos)", r"resize's mode must be bilinear or bicubic, not 'lanczos'"),
    ("resize(32.5)", r"resize's size must be a whole number"),
    ("resize(0)", r"at least 1"),
    ("flip(p=2)", r"flip's p must be between 0 and 1"),
    ("flip(q=0.5)", r"flip has no argument 'q'"),
    ("flip(0.5,p=0.5)", r"flip is given p twice"),
    ("rgb(1)", r"rgb has too many arguments"),
    ("random_resized_crop(32,scale=1:0.2)", r"scale must be two numbers low:high, not '1:0.2'"),
    ("random_resized_crop(32,scale=0.2)", r"scale must be two numbers low:high"),
    ("random_resized_crop(32,scale=0.2:2)", r"scale must be between 1e-06 and 1"),
    ("normalize(cifar1000)", r"unknown normalisation 'cifar1000'; did you mean 'cifar100'"),
    ("normalize(0.5,0)", r"needs stds above 0"),
    ("normalize(0.5,0.5,0.5)", r"normalize takes the name of a data set, or one mean and std"),
    ("normalize(a,b)", r"normalize takes the name"),
    ("normalize", r"normalize takes the name"),
    ("scale(-1,nan)", r"scale's high must be a number"),
    ("normalize(imagenet) brightness(0.1)", r"brightness works on pixels in \[0, 1\]: put it before normalize"),
    ("scale(-1,1) normalize(imagenet)", r"normalize works on pixels"),
    ("flip pad_crop(4", r"cannot be read at 'pad_crop\(4'"),
    ("flip,resize(3)", r"cannot be read at 'flip,resize\(3\)'"),
    ("flip!", r"cannot be read"),
])  # fmt: skip
def test_errors_say_where_and_what_would_be_right(text: str, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as caught:
        parse_view(text)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(alphabet="abcdefgilnoprsz_() ,.=:-0123456789", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_view_or_an_input_error(text: str) -> None:
    try:
        view = parse_view(text)
    except InputError:
        return
    assert all(type(operation) in OPERATIONS.values() for operation in view.operations)


def test_spaces_and_keywords() -> None:
    plain = parse_view("random_resized_crop(32,bicubic,scale=0.2:1) flip")
    spaced = parse_view("  random_resized_crop( 32 , mode=bicubic, scale = 0.2:1 )   flip( ) ")
    assert plain.operations == spaced.operations
    assert set(OPERATIONS) >= {text.split("(")[0] for view in ALL for text in view.split()}


# -- speed ------------------------------------------------------------------------------------------------------------
def test_a_small_batch_costs_tens_of_microseconds() -> None:
    images = pictures(10)
    view = parse_view("normalize(cifar100)")
    best = math.inf
    for _ in range(200):
        start = time.process_time()
        for _ in range(10):
            view(images)
        best = min(best, (time.process_time() - start) / 10)
    assert best < 100e-6  # 13 us on two cores of a cloud machine; a busy one is no reason to fail
