"""Weight files: what goes in comes out, what does not fit is said, what is broken is refused."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clbench import backbones
from clbench.errors import InputError

SHAPE = (3, 8, 8)
SMALL = {"nf": 4}


@pytest.fixture(scope="module")
def trained() -> backbones.Backbone:
    """A small network whose every tensor differs from what a new one starts with."""
    net = backbones.build("reduced-resnet18", in_shape=SHAPE, seed=7, options=SMALL)
    for index, value in enumerate(net.state_dict().values()):
        value.copy_(torch.full_like(value, index + 1) if not value.is_floating_point() else value + 0.25)
    return net


def load(path: Path, **options: object) -> backbones.Backbone:
    return backbones.build("reduced-resnet18", in_shape=SHAPE, seed=0, weights=path, options={**SMALL, **options})


def assert_same(net: nn.Module, other: nn.Module) -> None:
    for key, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def save_plain(net: nn.Module, path: Path) -> None:
    torch.save(net.state_dict(), path)


def save_inner(net: nn.Module, path: Path) -> None:
    torch.save(net.net.state_dict(), path)


def save_safetensors(net: nn.Module, path: Path) -> None:
    save_file(net.state_dict(), path)


def save_checkpoint(net: nn.Module, path: Path) -> None:
    """As a distributed training script leaves it: nested, prefixed, with a classifier and its arguments."""
    state = {f"module.{key}": value for key, value in net.net.state_dict().items()}
    state |= {"module.fc.weight": torch.rand(10, 32), "module.fc.bias": torch.rand(10)}
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1), "optimizer": {"lr": 0.1}}, path)


def save_moco(net: nn.Module, path: Path) -> None:
    """A momentum encoder and a projection head beside the network."""
    state: dict[str, Tensor] = {"module.predictor.0.weight": torch.rand(3)}
    for key, value in net.net.state_dict().items():
        state[f"module.base_encoder.{key}"] = value
        state[f"module.momentum_encoder.{key}"] = value * 0
    torch.save({"state_dict": state}, path)


def save_legacy(net: nn.Module, path: Path) -> None:
    torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (save_plain, "w.pth"), (save_inner, "w.pt"), (save_safetensors, "w.safetensors"), (save_safetensors, "w.bin"),
        (save_checkpoint, "w.pth"), (save_moco, "w.pth.tar"), (save_legacy, "w.pth"),
    ],
)  # fmt: skip
def test_round_trip(trained: nn.Module, tmp_path: Path, save: Callable[[nn.Module, Path], None], name: str) -> None:
    save(trained, tmp_path / name)
    net = load(tmp_path / name)
    assert_same(net, trained)
    assert net.fingerprint == backbones.fingerprint(trained)
    assert net.pretrained_on == ("unknown",)


def test_half_precision_is_read_as_float(trained: nn.Module, tmp_path: Path) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in trained.state_dict().items()}
    save_file(half, tmp_path / "w.safetensors")
    state = load(tmp_path / "w.safetensors").state_dict()
    assert state["net.conv1.weight"].dtype == torch.float32
    torch.testing.assert_close(state["net.conv1.weight"], half["net.conv1.weight"].float(), rtol=0, atol=0)


def test_batch_counters_may_lack(trained: nn.Module, tmp_path: Path) -> None:
    torch.save({k: v for k, v in trained.state_dict().items() if "num_batches" not in k}, tmp_path / "w.pth")
    assert torch.equal(load(tmp_path / "w.pth").net.conv1.weight, trained.net.conv1.weight)


def test_what_does_not_fit_is_named_and_nothing_is_loaded(trained: nn.Module, tmp_path: Path) -> None:
    state = trained.state_dict()
    del state["net.conv1.weight"]
    state["net.extra.weight"] = torch.zeros(1)
    state["net.bn1.weight"] = torch.zeros(5)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError) as caught:
        load(tmp_path / "w.pth")
    text = str(caught.value)
    for part in ("it lacks 'conv1.weight'", "unexpected 'extra.weight'", "'bn1.weight' is (5,), not (4,)", "w.pth"):
        assert part in text
    with pytest.raises(InputError, match=r"does not fit backbone mlp: it lacks .* and 1 more"):
        backbones.build("mlp", in_shape=SHAPE, seed=0, weights=tmp_path / "w.pth")
    save_plain(trained, tmp_path / "v.pth")
    with pytest.raises(InputError, match=r"'conv1.weight' is \(4, 3, 3, 3\), not \(20, 3, 3, 3\).* and \d\d more"):
        backbones.build("reduced-resnet18", in_shape=SHAPE, seed=0, weights=tmp_path / "v.pth")


@pytest.mark.parametrize("save", [save_plain, save_safetensors, save_legacy])
def test_truncated_files_are_refused(
    trained: nn.Module, tmp_path: Path, save: Callable[[nn.Module, Path], None]
) -> None:
    path = tmp_path / ("w.safetensors" if save is save_safetensors else "w.pth")
    save(trained, path)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match="truncated, corrupt or of another kind"):
            load(path)


def test_other_files_are_refused(trained: nn.Module, tmp_path: Path) -> None:
    cases: dict[str, tuple[Callable[[Path], object], str]] = {
        "noise.pth": (
            lambda p: p.write_bytes(np.random.default_rng(0).bytes(5000)),
            "truncated, corrupt or of another",
        ),
        "text.safetensors": (lambda p: p.write_text("not weights at all"), "truncated, corrupt or of another"),
        "number.pth": (lambda p: torch.save(3, p), "holds no state dict but a int"),
        "empty.pth": (lambda p: torch.save({"epoch": 3}, p), "holds no state dict but a dict"),
        "object.pth": (lambda p: torch.save(nn.Linear(1, 1), p), "holds Python objects"),
        "folder": (lambda p: p.mkdir(), "cannot read weights file .*directory"),
        "missing.pth": (lambda p: None, "cannot read weights file .*No such file"),
    }
    for name, (make, says) in cases.items():
        make(tmp_path / name)
        with pytest.raises(InputError, match=says) as caught:
            load(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    state = trained.state_dict()
    state["net.conv1.weight"] = state["net.conv1.weight"] * torch.nan
    torch.save(state, tmp_path / "nan.pth")
    with pytest.raises(InputError, match=r"'net.conv1.weight' has numbers that are not finite"):
        load(tmp_path / "nan.pth")


def test_what_weights_were_pretrained_on(trained: nn.Module, tmp_path: Path) -> None:
    silent, telling = tmp_path / "silent.safetensors", tmp_path / "telling.safetensors"
    save_file(trained.state_dict(), silent)
    save_file(trained.state_dict(), telling, metadata={"pretrained_on": "ImageNet-1k"})
    assert load(silent).pretrained_on == ("unknown",)
    assert load(silent, pretrained_on="cifar10, ImageNet").pretrained_on == ("cifar10", "imagenet")
    assert load(silent, pretrained_on="none").pretrained_on == ()
    assert load(telling).pretrained_on == ("imagenet",)
    assert load(telling, pretrained_on="none").pretrained_on == ("imagenet",)  # a file's own word stays
    torch.save({"model": trained.state_dict(), "pretrained_on": "in21k"}, tmp_path / "w.pth")
    assert load(tmp_path / "w.pth").pretrained_on == ("imagenet21k",)
    assert load(silent).fingerprint == load(telling).fingerprint


def jax_layout(vit: nn.Module) -> dict[str, np.ndarray]:
    """A ViT's state in the layout of the authors' .npz files (heads and kernels as JAX keeps them)."""
    dim, heads = vit.embed_dim, vit.blocks[0].attn.num_heads
    out: dict[str, Tensor] = {
        "embedding/kernel": vit.patch_embed.proj.weight.permute(2, 3, 1, 0),
        "embedding/bias": vit.patch_embed.proj.bias,
        "cls": vit.cls_token,
        "Transformer/posembed_input/pos_embedding": vit.pos_embed,
        "Transformer/encoder_norm/scale": vit.norm.weight,
        "Transformer/encoder_norm/bias": vit.norm.bias,
        "head/kernel": torch.zeros(dim, 5),
        "head/bias": torch.zeros(5),
    }
    for index, block in enumerate(vit.blocks):
        at = f"Transformer/encoderblock_{index}/"
        attention = at + "MultiHeadDotProductAttention_1/"
        for part, weight, bias in zip(
            ("query", "key", "value"), block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True
        ):
            out[f"{attention}{part}/kernel"] = weight.t().reshape(dim, heads, dim // heads)
            out[f"{attention}{part}/bias"] = bias.reshape(heads, dim // heads)
        out[attention + "out/kernel"] = block.attn.proj.weight.t().reshape(heads, dim // heads, dim)
        out[attention + "out/bias"] = block.attn.proj.bias
        for name, norm in (("LayerNorm_0", block.norm1), ("LayerNorm_2", block.norm2)):
            out[f"{at}{name}/scale"], out[f"{at}{name}/bias"] = norm.weight, norm.bias
        for name, layer in (("Dense_0", block.mlp.fc1), ("Dense_1", block.mlp.fc2)):
            out[f"{at}MlpBlock_3/{name}/kernel"] = layer.weight.t()
            out[f"{at}MlpBlock_3/{name}/bias"] = layer.bias
    return {key: value.detach().contiguous().numpy() for key, value in out.items()}


def test_npz_of_the_vit_authors(tmp_path: Path) -> None:
    options = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    source = backbones.build("vit_tiny_patch16_224", in_shape=(3, 224, 224), seed=5, pretrained=False, options=options)
    path = tmp_path / "B_16.npz"
    np.savez(path, **jax_layout(source.net))
    name = "vit_tiny_patch16_224.augreg_in21k"
    net = backbones.build(name, in_shape=(3, 224, 224), seed=0, weights=path, options=options)
    assert_same(net, source)
    assert net.pretrained_on == ("imagenet21k",)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=re.escape(f"{path} does not fit backbone {name} or is damaged")):
        backbones.build(name, in_shape=(3, 224, 224), seed=0, weights=path, options=options)
    with pytest.raises(InputError, match=r"reads .npz weights of ViTs only"):
        backbones.build("resnet10t", in_shape=(3, 32, 32), seed=0, weights=path)
    with pytest.raises(InputError, match="no such file"):
        backbones.build(name, in_shape=(3, 224, 224), seed=0, weights=tmp_path / "no.npz", options=options)
