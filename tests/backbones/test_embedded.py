"""The built-in backbones against the numbers of their cards, and what the seed decides."""

import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench import backbones
from clbench.backbones.catalogue import EMBEDDED
from clbench.backbones.embedded import SmallResNet18
from clbench.errors import InputError
from clbench.rng import derive_seed


def count_macs(net: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-adds of convolutions and linear layers on one image, from the shapes that pass."""
    total = 0

    def add(module: nn.Module, _: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        per_output = module.weight[0].numel()  # inputs per output number: C_in / groups * k * k, or C_in
        total += out.numel() * per_output

    hooks = [m.register_forward_hook(add) for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        net.eval()(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return total


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "size", "features", "params", "mmacs"),
    [
        ("reduced-resnet18", 32, 160, 1_093_140, 54.6),
        ("reduced-resnet18", 64, 640, 1_093_140, 218.5),
        ("reduced-resnet18", 84, 640, 1_093_140, 385.2),
        ("resnet18-cifar", 32, 512, 11_168_832, 555.4),
    ],
)
def test_resnets_have_the_sizes_of_the_card(name: str, size: int, features: int, params: int, mmacs: float) -> None:
    net = backbones.build(name, in_shape=(3, size, size), seed=0)
    assert net.num_features == features
    assert parameters(net) == params
    # The card counts convolutions and the head-less network; its numbers are rounded to 0.1 M.
    assert count_macs(net, (3, size, size)) / 1e6 == pytest.approx(mmacs, abs=0.06)


def test_reduced_resnet_at_128_px_has_2560_features_and_global_pool_160() -> None:
    assert backbones.build("reduced-resnet18", in_shape=(3, 128, 128), seed=0).num_features == 2560
    net = backbones.build("reduced-resnet18", in_shape=(3, 84, 84), seed=0, options={"pool": "global"})
    assert net.num_features == 160
    assert backbones.build("resnet18-cifar", in_shape=(3, 64, 64), seed=0).num_features == 512


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 16, 24), (1, 1, 1)])
def test_small_images_are_pooled_whole(shape: tuple[int, int, int]) -> None:
    net = backbones.build("reduced-resnet18", in_shape=shape, seed=0).eval()
    images = torch.rand(2, *shape)
    assert net.num_features == 160
    assert isinstance(net.net, SmallResNet18)
    net.net.pool = "global"  # a map below 4 x 4 has one window
    whole = net(images)
    net.net.pool = "avg4"
    torch.testing.assert_close(net(images), whole)


def test_avg4_drops_rows_that_fill_no_window() -> None:
    net = backbones.build("reduced-resnet18", in_shape=(3, 84, 84), seed=0).eval()
    assert isinstance(net.net, SmallResNet18)
    maps: list[Tensor] = []
    net.net.blocks.register_forward_hook(lambda _m, _i, out: maps.append(out))
    with torch.no_grad():
        features = net(torch.rand(1, 3, 84, 84))
    assert maps[0].shape == (1, 160, 11, 11)
    expected = maps[0][:, :, :8, :8].reshape(1, 160, 2, 4, 2, 4).mean((3, 5)).flatten(1)
    torch.testing.assert_close(features, expected)


def test_resnet_block_matches_plain_functions() -> None:
    """One strided block, computed here from the card's words: conv-BN-ReLU-conv-BN, plus 1x1 conv-BN, ReLU."""
    block = SmallResNet18(3, 4, "avg4").blocks[2].eval()
    x = torch.rand(2, 4, 8, 8)

    def bn(module: nn.BatchNorm2d, y: Tensor) -> Tensor:
        return (y - module.running_mean[:, None, None]) / (module.running_var[:, None, None] + 1e-5).sqrt()

    out = bn(block.bn1, F.conv2d(x, block.conv1.weight, stride=2, padding=1)).clamp(min=0)
    out = bn(block.bn2, F.conv2d(out, block.conv2.weight, padding=1))
    out = (out + bn(block.shortcut[1], F.conv2d(x, block.shortcut[0].weight, stride=2))).clamp(min=0)
    torch.testing.assert_close(block(x), out)
    assert block.bn1.momentum == 0.1


def test_mlp_is_linear_relu_twice_with_default_initialisation() -> None:
    net = backbones.build("mlp", in_shape=(1, 28, 28), seed=3)
    assert parameters(net) == 784 * 400 + 400 + 400 * 400 + 400
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(3, "init"))
        first, second = nn.Linear(784, 400), nn.Linear(400, 400)
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(net(x), second(first(x.flatten(1)).relu()).relu(), rtol=0, atol=0)
    small = backbones.build("mlp", in_shape=(1, 8, 8), seed=0, options={"width": "16", "depth": "1"})
    assert small.num_features == 16
    assert parameters(small) == 64 * 16 + 16


def test_vit_and_flatten() -> None:
    net = backbones.build("vit-tiny-32", in_shape=(3, 32, 32), seed=0)
    assert net.num_features == 192
    assert net.net.pos_embed.shape == (1, 65, 192)  # 8 x 8 patches of 4 px and the class token
    assert (
        backbones.build("vit-tiny-32", in_shape=(1, 28, 28), seed=0, options={"depth": 1}).net.pos_embed.shape[1] == 50
    )
    flat = backbones.build("flatten", in_shape=(1, 8, 8), seed=0)
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(flat(images), images.view(3, 64))
    assert len(flat.fingerprint) == 64


def test_catalogue_tells_the_truth() -> None:
    for record in backbones.list_backbones():
        if record["name"] not in EMBEDDED:  # models with a text tower: test_clip.py
            continue
        shape = (1, 28, 28) if record["name"] == "mlp" else (3, 32, 32)
        net = backbones.build(record["name"], in_shape=shape, seed=0)
        assert parameters(net) == int(re.split(r"\s", record["parameters"].replace(",", ""))[0]), record
        if record["name"] != "flatten":
            assert net.num_features == int(record["features"].split()[0]), record
        given = backbones.build(record["name"], in_shape=shape, seed=0, options=record["options"])
        assert torch.equal(net.eval()(torch.ones(1, *shape)), given.eval()(torch.ones(1, *shape)))  # its defaults


def test_list_needs_no_torch() -> None:
    code = (
        "import sys; from clbench.backbones import guard, list_backbones; assert len(list_backbones()) >= 4; "
        "assert guard(('imagenet',), ['imagenet']); assert 'torch' not in sys.modules and 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["mlp", "reduced-resnet18", "vit-tiny-32"])
def test_the_seed_decides_the_weights_and_nothing_else_moves(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = backbones.build(name, in_shape=(3, 8, 8), seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = backbones.build(name, in_shape=(3, 8, 8), seed=1)
    other = backbones.build(name, in_shape=(3, 8, 8), seed=2)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert all(module.training for module in first.modules())
    assert first.pretrained_on == ()
    assert first.native_view is None


def test_fingerprint_knows_state_and_options() -> None:
    net = backbones.build("reduced-resnet18", in_shape=(3, 8, 8), seed=0)
    pooled = backbones.build("reduced-resnet18", in_shape=(3, 8, 8), seed=0, options={"pool": "global"})
    assert pooled.fingerprint != net.fingerprint  # same state, another function
    assert backbones.fingerprint(net) == net.fingerprint
    with torch.no_grad():
        net.net.bn1.running_mean[0] += 1e-6
    assert backbones.fingerprint(net) != net.fingerprint


@pytest.mark.parametrize(
    ("name", "shape", "options", "says"),
    [
        ("reduced-resnet8", (3, 32, 32), {}, "did you mean 'reduced-resnet18'"),
        ("mlp", (1, 8, 8), {"widht": 3}, "did you mean 'width'"),
        ("mlp", (1, 8, 8), {"width": "-1"}, "whole number above 0, not -1"),
        ("mlp", (1, 8, 8), {"width": True}, "whole number above 0, not True"),
        ("reduced-resnet18", (3, 32, 32), {"pool": "max"}, "unknown pool of backbone reduced-resnet18 'max'"),
        ("vit-tiny-32", (3, 30, 30), {}, "4 px patches"),
        ("vit-tiny-32", (3, 32, 32), {"heads": 5}, "its heads divide"),
        ("mlp", (1, 8, 8), {"final_norm": "fresh"}, "no final LayerNorm"),
        ("mlp", (1, 8, 8), {"final_norm": "new"}, "final_norm"),
        ("mlp", (1, 8, 8), {"feature": "cls"}, "no class token"),
        ("mlp", (1, 8, 8), {"pretrained_on": "imagenet"}, "starts from random weights"),
        ("mlp", (1, 0, 8), {}, "shape (C, H, W), not (1, 0, 8)"),
    ],
)
def test_bad_input_is_one_sentence(
    name: str, shape: tuple[int, int, int], options: dict[str, object], says: str
) -> None:
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        backbones.build(name, in_shape=shape, seed=0, options=options)
    assert "\n" not in str(caught.value)
