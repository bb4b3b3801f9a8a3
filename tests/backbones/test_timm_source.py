"""timm names, tags and views; weights that cannot be had; the options of the papers."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from clbench import backbones
from clbench.backbones.factory import parse_option
from clbench.backbones.timm_source import published_file, resolve
from clbench.data.views import parse_view
from clbench.errors import InputError

VIT = {"depth": 1, "embed_dim": 48, "num_heads": 3}


def vit(in_shape: tuple[int, int, int] = (3, 224, 224), seed: int = 0, **options: object) -> backbones.Backbone:
    given = {"pretrained": "false", **VIT, **options}
    return backbones.build("vit_tiny_patch16_224", in_shape=in_shape, seed=seed, options=given)


def test_names_are_resolved_to_their_tag() -> None:
    assert resolve("mobilenetv2_100", published=True).name == "mobilenetv2_100.ra_in1k"
    assert resolve("mobilenetv2_100", published=False).name == "mobilenetv2_100"
    # The name that the papers' code used, under timm 0.5 and 0.6.
    assert resolve("vit_base_patch16_224_in21k", published=True).name == "vit_base_patch16_224.augreg_in21k"
    with pytest.raises(InputError, match=r"write the tag out, one of .*vit_base_patch16_224.augreg_in21k,"):
        resolve("vit_base_patch16_224", published=True)
    assert resolve("vit_base_patch16_224", published=False).tag == ""
    with pytest.raises(InputError, match=r"did you mean 'vit_base_patch16_224.augreg_in21k'"):
        resolve("vit_base_patch16_224.augreg_in21", published=True)
    with pytest.raises(InputError, match="unknown backbone 'hf-hub:timm/x'"):
        resolve("hf-hub:timm/x", published=True)


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        ("vit_base_patch16_224.augreg_in21k", ("imagenet21k",)),
        ("vit_base_patch16_224.augreg_in21k_ft_in1k", ("imagenet", "imagenet21k")),
        ("vit_base_patch16_clip_224.openai", ("web",)),
        ("vit_base_patch16_clip_224.laion2b_ft_in12k_in1k", ("imagenet", "imagenet12k", "web")),
        ("vit_small_patch14_dinov2.lvd142m", ("lvd142m",)),
        ("vit_base_patch16_224.dino", ("imagenet",)),
        ("resnet50.a1_in1k", ("imagenet",)),
    ],
)
def test_tags_of_pretraining(name: str, tags: tuple[str, ...]) -> None:
    found = resolve(name, published=True)
    assert found.pretrained_on == tags
    assert (backbones.guard(tags, ["imagenet"]) is None) == (tags == ("web",))


def test_most_published_weights_say_what_they_saw() -> None:
    unknown = [name for name in timm.list_pretrained() if resolve(name, published=True).pretrained_on == ("unknown",)]
    assert len(unknown) < 0.12 * len(timm.list_pretrained()), unknown


def test_guard() -> None:
    assert backbones.guard((), ["imagenet"]) is None
    assert backbones.guard(("imagenet", "web"), ["cifar100", "tiny-images"]) is None
    assert backbones.guard(("imagenet",), []) is None
    assert "where these images come from" in str(backbones.guard(("cifar10", "imagenet"), ["imagenet"]))
    for tag in ("imagenet12k", "imagenet21k", "lvd142m", "merged30m"):
        assert f"{tag}, which has the images of imagenet" in str(backbones.guard((tag,), ["imagenet"]))
    assert "pretrained_on=TAG" in str(backbones.guard(("unknown",), ["imagenet"]))


def test_native_views_are_timms_own_pipeline() -> None:
    for name in ("vit_base_patch16_224.augreg_in21k", "mobilenetv2_100.ra_in1k", "vit_base_patch16_clip_224.openai"):
        text = backbones.native_view(name)
        assert text is not None
        view = parse_view(text)
        assert view.output_shape((1, 28, 32)) == (3, 224, 224)
        config = resolve(name, published=True).config
        transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config.to_dict()))
        # Smooth, because PIL rounds and cuts to 8 bit after each of its two passes: a grey level or two apart.
        coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
        images = F.interpolate(coarse, (250, 300), mode="bilinear").to(torch.uint8)
        image = Image.fromarray(images[0].permute(1, 2, 0).numpy())
        assert (view(images)[0] - transform(image)).abs().max() < 2.5 / 255 / min(config.std)
    assert backbones.native_view("mlp") is None
    assert backbones.native_view("resnet18", pretrained=False) is None
    assert backbones.native_view("resnet18", weights=Path("w.pth")) is None
    assert backbones.native_view("resnet18.a1_in1k", weights=Path("w.pth")) is not None


def test_random_weights_need_no_tag_and_take_any_shape() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    net = backbones.build("resnet10t", in_shape=(1, 28, 28), seed=0, options={"pretrained": "false"})
    assert torch.equal(torch.get_rng_state(), before)
    assert (net.name, net.pretrained_on, net.native_view) == ("resnet10t", (), None)
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, net.num_features) == (2, 512)
    assert (
        net.fingerprint
        == backbones.build("resnet10t.c3_in1k", in_shape=(1, 28, 28), seed=0, pretrained=False).fingerprint
    )
    assert vit((1, 32, 48)).net.pos_embed.shape == (1, 7, 48)


def test_feature_width_is_what_comes_out() -> None:
    """timm's own num_features is the width before the last layer for some networks."""
    net = backbones.build("mobilenetv3_small_050", in_shape=(3, 32, 32), seed=0, pretrained=False)
    assert net.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, net.num_features) == (2, 1024)


def test_cls_is_the_pooled_output_of_a_vit_with_token_pooling() -> None:
    """What nmc's card calls forward_features(x)[:, 0]: pooling by token, no norm behind it."""
    images = torch.rand(2, 3, 224, 224)
    pooled, cls = vit().eval(), vit(feature="cls").eval()
    assert isinstance(pooled.net.fc_norm, torch.nn.Identity)
    assert torch.equal(cls(images), pooled.net.forward_features(images)[:, 0])
    assert torch.equal(cls(images), pooled(images))
    averaged = vit(global_pool="avg").eval()
    assert not torch.equal(averaged(images), pooled(images))
    assert len({pooled.fingerprint, cls.fingerprint, averaged.fingerprint}) == 3


def test_fresh_final_norm() -> None:
    net, fresh = vit(seed=3).eval(), vit(seed=3, final_norm="fresh").eval()
    with torch.no_grad():
        for each in (net.net.norm, fresh.net.norm):
            assert isinstance(each, torch.nn.LayerNorm)
    assert (net.net.norm.eps, fresh.net.norm.eps) == (1e-6, 1e-5)
    before: list[torch.Tensor] = []
    fresh.net.norm.register_forward_hook(lambda _m, inputs, _o: before.append(inputs[0]))
    out = fresh(torch.rand(2, 3, 224, 224))
    torch.testing.assert_close(out, F.layer_norm(before[0][:, 0], (48,), eps=1e-5))


def test_fresh_norm_forgets_the_files_norm(tmp_path: Path) -> None:
    source = vit(seed=1)
    torch.nn.init.constant_(source.net.norm.weight, 3.0)
    torch.save(source.net.state_dict(), tmp_path / "w.pth")
    options = {**VIT, "final_norm": "fresh"}
    net = backbones.build(
        "vit_tiny_patch16_224.augreg_in21k", in_shape=(3, 224, 224), seed=0, weights=tmp_path / "w.pth", options=options
    )
    assert torch.equal(net.net.norm.weight, torch.ones(48))
    assert torch.equal(net.net.blocks[0].attn.qkv.weight, source.net.blocks[0].attn.qkv.weight)
    assert net.native_view == "rgb resize_short(248,bicubic) center_crop(224) normalize(0.5,0.5)"
    assert net.pretrained_on == ("imagenet21k",)


def test_position_embeddings_follow_the_images(tmp_path: Path) -> None:
    source = vit(seed=1)
    torch.save(source.net.state_dict(), tmp_path / "w.pth")
    net = backbones.build("vit_tiny_patch16_224", in_shape=(3, 96, 96), seed=0, weights=tmp_path / "w.pth", options=VIT)
    assert net.net.pos_embed.shape == (1, 37, 48)
    assert torch.equal(net.net.pos_embed[:, 0], source.net.pos_embed[:, 0])
    assert net(torch.zeros(1, 3, 96, 96)).shape == (1, 48)


def test_files_of_another_layout_are_converted_by_timm(tmp_path: Path) -> None:
    """A ViT trained at 64 px, with the old `pre_logits` layer beside it: timm's own filter resamples and drops."""
    source = vit((3, 64, 64), seed=1)
    state = {**source.net.state_dict(), "pre_logits.fc.weight": torch.zeros(4, 4), "head.weight": torch.zeros(9, 48)}
    torch.save(state, tmp_path / "w.pth")
    net = backbones.build(
        "vit_tiny_patch16_224", in_shape=(3, 224, 224), seed=0, weights=tmp_path / "w.pth", options=VIT
    )
    assert net.net.pos_embed.shape == (1, 197, 48)
    assert torch.equal(net.net.blocks[0].mlp.fc1.weight, source.net.blocks[0].mlp.fc1.weight)


def test_options_arrive_as_texts() -> None:
    assert [parse_option(x) for x in ("1e-3", "true", "None", "same", "(96, 128)", "0.5", "7", 3)] == [
        1e-3, True, None, "same", (96, 128), 0.5, 7, 3,
    ]  # fmt: skip
    net = backbones.build(
        "mobilenetv2_035",
        in_shape=(3, 32, 32),
        seed=0,
        pretrained=False,
        options={"pad_type": "same", "bn_eps": "1e-3"},
    )
    assert net.net.bn1.eps == 1e-3
    assert "Same" in type(net.net.conv_stem).__name__
    with pytest.raises(InputError, match=r"timm cannot build backbone mobilenetv2_035 .* with foo=1: .*'foo'"):
        backbones.build("mobilenetv2_035", in_shape=(3, 32, 32), seed=0, pretrained=False, options={"foo": "1"})
    with pytest.raises(InputError, match="not one vector of features"):
        backbones.build("resnet10t", in_shape=(3, 32, 32), seed=0, pretrained=False, options={"global_pool": "''"})
    with pytest.raises(InputError, match="3 channels, not 1: put rgb"):
        backbones.build("resnet10t", in_shape=(1, 32, 32), seed=0)
    with pytest.raises(InputError, match=r"backbone vgg11 cannot take images of shape \(3, 8, 8\): .*; change their"):
        backbones.build("vgg11", in_shape=(3, 8, 8), seed=0, pretrained=False)


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's client as on a machine without a network, with an empty cache at the path returned."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    return tmp_path / "hub"


@pytest.mark.parametrize("offline", [True, False])
def test_weights_out_of_reach_are_one_quick_sentence(
    no_hub: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    name = "vit_base_patch16_224.augreg_in21k"
    start = time.monotonic()
    with pytest.raises(InputError, match="offline mode" if offline else "refused") as caught:
        backbones.build(name, in_shape=(3, 224, 224), seed=0)
    assert time.monotonic() - start < 10
    text = str(caught.value)
    assert "\n" not in text
    for part in (f"model.safetensors of the Hugging Face repository timm/{name}", "--weights FILE", "pretrained=false"):
        assert part in text
    assert "reduced-resnet18" in text


def test_weights_published_at_an_address_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = resolve("gcvit_xxtiny.in1k", published=True)
    closed = replace(found, config=replace(found.config, url="http://127.0.0.1:9/gcvit.pth"))
    with pytest.raises(InputError, match=r"refused.*fetch http://127.0.0.1:9/gcvit.pth on another machine"):
        published_file(closed)
    (tmp_path / "hub" / "checkpoints" / "gcvit.pth").write_bytes(b"")
    assert published_file(closed) == tmp_path / "hub" / "checkpoints" / "gcvit.pth"
    with pytest.raises(InputError, match="timm publishes no weights"):
        published_file(replace(found, config=replace(found.config, url=None)))


def test_cached_weights_are_used_without_a_network(no_hub: Path) -> None:
    source = backbones.build("resnet10t", in_shape=(3, 32, 32), seed=9, pretrained=False)
    folder = no_hub / "models--timm--resnet10t.c3_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    file = folder / "snapshots" / ("0" * 40) / "model.safetensors"
    save_file({**source.net.state_dict(), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, file)
    net = backbones.build("resnet10t", in_shape=(3, 32, 32), seed=0)
    assert (net.name, net.pretrained_on) == ("resnet10t.c3_in1k", ("imagenet",))
    assert net.fingerprint == source.fingerprint
    assert net.native_view == backbones.native_view("resnet10t")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"model.safetensors cannot be read .* truncated"):
        backbones.build("resnet10t", in_shape=(3, 32, 32), seed=0)
