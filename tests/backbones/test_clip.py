"""Models of open_clip as backbones: names, activations, weight files, texts, passes; and the clip-small that ships."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.factory import _MODEL_CONFIG_PATHS, _MODEL_CONFIGS, _rescan_model_configs
from safetensors.torch import save_file
from torch import Tensor, nn

from clbench import backbones
from clbench.backbones import clip_small, clip_source
from clbench.backbones.clip_model import ClipBackbone, as_clip
from clbench.backbones.clip_small import WordTokenizer
from clbench.backbones.provenance import guard
from clbench.errors import InputError, RunFailed
from clbench.pretrain.evaluate import HELD_OUT

TEXTS = ["a photo of a dog.", "a photo of the very large and rather old house on the hill, in fog", "cat"]
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 8, "layers": 2, "width": 16, "head_width": 8, "patch_size": 4},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
MODELS = {
    "tiny": TINY,
    "tiny-quickgelu": {**TINY, "quick_gelu": True},
    "tiny-custom": {**TINY, "custom_text": True},
}


@pytest.fixture(autouse=True)
def tiny_models(tmp_path: Path) -> Iterator[None]:
    """Configurations beside open_clip's own, of the same format."""
    folder = tmp_path / "configs"
    folder.mkdir()
    before = list(_MODEL_CONFIG_PATHS)
    for name, config in MODELS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    yield
    _MODEL_CONFIG_PATHS[:] = before
    for name in MODELS:
        _MODEL_CONFIGS.pop(name, None)
    _rescan_model_configs()


def build(name: str = "clip:tiny", side: int = 8, **more: object) -> ClipBackbone:
    options = {"pretrained": False} if "weights" not in more else {}
    options |= more.pop("options", {})  # type: ignore[arg-type]
    net = backbones.build(name, in_shape=(3, side, side), seed=0, options=options, **more)  # type: ignore[arg-type]
    assert isinstance(net, ClipBackbone)
    return net


def images(number: int = 5, side: int = 8) -> Tensor:
    return torch.rand((number, 3, side, side), generator=torch.Generator().manual_seed(1))


# -- names and activations ---------------------------------------------------------------------------------------------
def test_a_tag_and_a_model_of_another_activation_are_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"QuickGELU.*take clip:ViT-B-16-quickgelu\.openai"):
        clip_source.resolve("clip:ViT-B-16.openai")
    found = clip_source.resolve("clip:ViT-B-16-quickgelu.openai")
    assert (found.model, found.tag, found.pretrained_on) == ("ViT-B-16-quickgelu", "openai", ("web",))
    assert clip_source.resolve("clip:ViT-B-16.laion2b_s34b_b88k").name == "clip:ViT-B-16.laion2b_s34b_b88k"
    assert not any("." in model for model in clip_source.open_clip_models())  # so a dot ends the model's name


def test_all_published_weights_resolve_or_name_the_model_that_they_are_for() -> None:
    refused = 0
    for model, tag in open_clip.list_pretrained():
        try:
            assert clip_source.native_view(f"clip:{model}.{tag}", weights=None, pretrained=True)
        except InputError as error:
            other = str(error).rpartition("clip:")[2].rpartition(".")[0]
            assert tag in open_clip.list_pretrained_tags_by_model(other), (model, tag)
            refused += 1
    assert refused >= 10  # the plain models of OpenAI's weights among them


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("clip:ViT-B-61", "ViT-B-16"),
        ("clip:ViT-B-16.laion2b", "laion2b_s34b_b88k"),
        ("clip:ViT-B-16", r"--weights FILE"),
        ("clip:ViT-B-16-quickgelu", r"clip:ViT-B-16-quickgelu\.openai"),
    ],
)
def test_unknown_names_and_names_without_weights(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        backbones.build(name, in_shape=(3, 224, 224), seed=0)


def test_a_file_under_a_name_that_stands_for_two_activations_must_say_which(tmp_path: Path) -> None:
    plain, quick = build("clip:tiny"), build("clip:tiny-quickgelu")
    save_file(plain.net.state_dict(), tmp_path / "w.safetensors")
    assert not torch.equal(plain(images()), quick(images()))  # same initial weights, another function
    with pytest.raises(InputError, match=r"GELU or QuickGELU.*quick_gelu=false"):
        build("clip:tiny", weights=tmp_path / "w.safetensors")
    given = build("clip:tiny", weights=tmp_path / "w.safetensors", options={"quick_gelu": False})
    assert torch.equal(given(images()), plain(images()))
    assert torch.equal(build("clip:tiny-quickgelu", weights=tmp_path / "w.safetensors")(images()), quick(images()))
    with pytest.raises(InputError, match="take clip:tiny-quickgelu"):
        build("clip:tiny", weights=tmp_path / "w.safetensors", options={"quick_gelu": True})


def test_published_weights_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        InputError, match=r"Hugging Face repository timm/vit_base_patch16_clip_224\.openai.*--weights FILE"
    ):
        backbones.build("clip:ViT-B-16-quickgelu.openai", in_shape=(3, 224, 224), seed=0)


# -- weight files ------------------------------------------------------------------------------------------------------
def test_the_layouts_that_weights_are_published_in(tmp_path: Path) -> None:
    model = build("clip:tiny-quickgelu")
    state = {key: value + 0.01 for key, value in model.net.state_dict().items()}
    model.net.load_state_dict(state)
    expected = model(images())
    save_file(state, tmp_path / "a.safetensors")
    save_file({key: value.half() for key, value in state.items()}, tmp_path / "half.safetensors")
    torch.save(state, tmp_path / "b.bin")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "c.pt")
    torch.jit.script(model.net).save(str(tmp_path / "d.pt"))  # as OpenAI's own files
    for file in ("a.safetensors", "b.bin", "c.pt", "d.pt"):
        loaded = build("clip:tiny-quickgelu", weights=tmp_path / file)
        assert torch.equal(loaded(images()), expected), file
        assert loaded.pretrained_on == ("unknown",)
    half = build("clip:tiny-quickgelu", weights=tmp_path / "half.safetensors")
    assert half.net.logit_scale.dtype == torch.float32
    torch.testing.assert_close(half(images()), expected, atol=1e-2, rtol=1e-2)
    custom = build("clip:tiny-custom", weights=tmp_path / "a.safetensors", options={"pretrained_on": "none"})
    assert custom.pretrained_on == ()
    reference = build("clip:tiny", weights=tmp_path / "a.safetensors", options={"quick_gelu": False})
    tokens = reference.tokenize(TEXTS)
    torch.testing.assert_close(custom.encode_text(custom.tokenize(TEXTS)), reference.encode_text(tokens))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    state = build("clip:tiny-quickgelu").net.state_dict()
    save_file({key: value for key, value in state.items() if "ln_final" not in key}, tmp_path / "part.safetensors")
    with pytest.raises(InputError, match=r"lacks 'ln_final"):
        build("clip:tiny-quickgelu", weights=tmp_path / "part.safetensors")
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match="cannot be read"):
        build("clip:tiny-quickgelu", weights=tmp_path / "broken.pt")
    with pytest.raises(InputError, match=r"cannot take images of shape \(3, 12, 12\)"):
        build("clip:tiny", side=12)
    with pytest.raises(InputError, match="RGB"):
        backbones.build("clip:tiny", in_shape=(1, 8, 8), seed=0, pretrained=False)
    with pytest.raises(InputError, match="micro_batch"):
        build("clip:tiny", options={"micro_batch": 0})
    with pytest.raises(InputError, match="unknown option"):
        build("clip:tiny", options={"microbatch": 4})
    with pytest.raises(InputError, match="final_norm"):
        build("clip:tiny", options={"feature": "cls"})


# -- towers ------------------------------------------------------------------------------------------------------------
def test_features_are_those_of_open_clip_and_short_texts_cost_less() -> None:
    model = build()
    tokens = model.tokenize(TEXTS)
    assert tokens.shape[1] < 30
    full = open_clip.get_tokenizer("ViT-B-32")(TEXTS)
    torch.testing.assert_close(model.encode_text(tokens), model.net.encode_text(full))
    assert torch.equal(model(images()), model.net.encode_image(images()))
    assert model.scale == pytest.approx(1 / 0.07)
    names = {id(p) for p in model.trainable()}
    assert names == {id(p) for n, p in model.named_parameters() if "logit_scale" not in n}
    assert not {id(p) for p in model.image_parameters()} & {id(p) for p in model.text_parameters()}


@pytest.mark.parametrize("options", [{"micro_batch": 2, "micro_texts": 1}, {"grad_checkpointing": True}])
@pytest.mark.parametrize("name", ["clip:tiny", "clip-small"])
def test_passes_and_checkpointing_change_no_gradient(name: str, options: dict[str, object]) -> None:
    side = 64 if name == "clip-small" else 8
    gradients = []
    for more in ({}, options):
        model = build(name, side, options=more).train()
        seen: list[int] = []
        model.net.visual.register_forward_hook(lambda m, args, out, seen=seen: seen.append(len(args[0])))
        similarity = model(images(5, side)) @ model.encode_text(model.tokenize(TEXTS)).T
        similarity.square().mean().backward()
        gradients.append([p.grad for p in model.trainable()])
        assert max(seen) == more.get("micro_batch", 5)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


def test_running_out_of_memory_says_what_to_lower() -> None:
    model = build(options={"micro_texts": 8})

    def fail(*args: object, **more: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")

    model.net.encode_image = fail
    with pytest.raises(RunFailed, match=r"encoding images \(2.50 GiB more.*micro_batch=16.*grad_checkpointing.*bf16"):
        model(images())
    model.net.transformer.forward = fail
    with pytest.raises(RunFailed, match=r"encoding texts.*micro_texts=4"):
        model.encode_text(model.tokenize(TEXTS))


def test_a_backbone_without_texts_is_refused() -> None:
    plain = backbones.build("mlp", in_shape=(1, 8, 8), seed=0)
    with pytest.raises(InputError, match=r"zscl compares images with texts, but backbone mlp.*clip-small"):
        as_clip(plain, "zscl")


def test_vit_b_16_of_clip_with_random_weights() -> None:
    model = build("clip:ViT-B-16-quickgelu", 224)
    with torch.no_grad():
        features = model(images(1, 224))
        texts = model.encode_text(model.tokenize(TEXTS[:1]))
    assert features.shape == texts.shape == (1, 512)
    assert sum(p.numel() for p in model.parameters()) == 149_620_737
    assert type(model.net.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert model.native_view is None
    assert model.pretrained_on == ()
    view = clip_source.native_view("clip:ViT-B-16-quickgelu.openai", weights=None, pretrained=True)
    assert view == "rgb resize_short(224,bicubic) center_crop(224) normalize(clip)"


# -- clip-small --------------------------------------------------------------------------------------------------------
def test_word_tokenizer() -> None:
    tokenizer = WordTokenizer(["photo", "of", "sun", "flower", "zero"], context_length=12, vocab_size=128)
    row = tokenizer(["A photo of sunflowers"])[0].tolist()
    ids = tokenizer.ids
    assert row[:8] == [126, ids["a"], ids["photo"], ids["of"], ids["sun"], ids["flower"], ids["s"], 127]
    assert row[8:] == [0, 0, 0, 0]
    assert tokenizer.encode('"0 - zero".') == [ids['"'], ids["0"], ids["-"], ids["zero"], ids['"'], ids["."]]
    assert tokenizer.encode("\u00e9") == [1]
    assert tokenizer(["a " * 50])[0, -1] == 127  # cut, with its end
    with pytest.raises(ValueError, match="do not fit"):
        WordTokenizer(["photo"], vocab_size=64)


def test_clip_small_ships_and_has_seen_no_image_of_its_held_out_domains() -> None:
    assert clip_small.WEIGHTS.stat().st_size <= 12 * 2**20
    model = backbones.build("clip-small", in_shape=(3, 64, 64), seed=0)
    assert isinstance(model, ClipBackbone)
    assert model.pretrained_on == ("cifar10", "fashion-mnist", "imagenet", "pacs", "usps")
    from clbench.data.catalogue import catalogue

    for name in HELD_OUT:
        assert guard(model.pretrained_on, catalogue()[name].images_of) is None, name
    for name in ("tiny-imagenet-subset", "cifar10-subset", "usps", "pacs"):
        assert guard(model.pretrained_on, catalogue()[name].images_of)
    listed = next(record for record in backbones.list_backbones() if record["name"] == "clip-small")
    assert f"{sum(p.numel() for p in model.parameters()):,}" == listed["parameters"]
    assert str(model.num_features) == listed["features"]
    other = build("clip-small", 64)
    assert other.pretrained_on == ()
    assert other.fingerprint != model.fingerprint
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert backbones.native_view("clip-small") == "rgb resize(64,bicubic)"


def test_weights_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    save_file(build("clip-small", 64).net.state_dict(), tmp_path / "w.safetensors", {"vocabulary": "0"})
    with pytest.raises(InputError, match="another vocabulary"):
        backbones.build("clip-small", in_shape=(3, 64, 64), seed=0, weights=tmp_path / "w.safetensors")


@pytest.mark.slow
@pytest.mark.skipif("CLBENCH_DATA" not in os.environ, reason="needs the data sets of mtil-small")
def test_clip_small_knows_four_held_out_domains_at_three_times_chance() -> None:
    from clbench.pretrain.evaluate import zero_shot

    model = backbones.build("clip-small", in_shape=(3, 64, 64), seed=0)
    assert isinstance(model, ClipBackbone)
    rows = zero_shot(model, device=torch.device("cpu"))
    assert sum(row.accuracy >= 3 * row.chance for row in rows) >= 4, rows
