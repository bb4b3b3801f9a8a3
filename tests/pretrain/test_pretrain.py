"""Captions, images and the training loop of clip-small, on the digits that come with scikit-learn."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_clip import tiny_clip
from torch import nn

from clbench import backbones, data
from clbench.backbones.clip_model import ClipBackbone
from clbench.backbones.clip_small import words
from clbench.cli import main
from clbench.data.catalogue import catalogue
from clbench.errors import InputError, RunFailed
from clbench.pretrain import train as training
from clbench.pretrain.captions import Domain, class_words, domains, step_texts, vocabulary
from clbench.pretrain.evaluate import HELD_OUT, zero_shot
from clbench.pretrain.export import export
from clbench.pretrain.images import augment, batch_sizes, recolour
from clbench.pretrain.train import Recipe, Source, contrast, rate, train

CPU = torch.device("cpu")
RECIPE = Recipe(steps=6, batch=16, warm_up=2, precision="fp32")


class Small(nn.Module):
    """An image tower that takes 64 px, in the place of tiny_clip's."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.inner = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(F.adaptive_avg_pool2d(x, 6))
        return out


def model() -> ClipBackbone:
    net = tiny_clip()
    net.net.visual = Small(net.net.visual)
    return net


def digits() -> list[Source]:
    store = data.load("digits", size=64)
    rows = torch.arange(len(store))
    parts = []
    for number, grey in enumerate((True, False)):
        own = rows[store.labels < 5] if number == 0 else rows[store.labels >= 5]
        domain = Domain("digits", 0.5, ("the number {}.",), grey=grey, wide=not grey)
        parts.append(Source(domain, store, own, store.labels[own], class_words(store.classes.names)))
    return parts


# -- captions ----------------------------------------------------------------------------------------------------------
def test_class_words() -> None:
    names = ["brown bear, bruin, Ursus arctos", "sea_slug", "3", "Trouser", "tabby, tabby cat"]
    found = class_words(names)
    assert found.names[:2] == (("brown bear", "bruin"), ("sea slug",))
    assert found.names[2] == ("3", "three", "3 - three")
    assert found.names[3][0] == "trouser"
    assert found.kind == ("bear", "slug", "3", "trouser", "cat")


def test_step_texts_name_every_class_that_is_there_and_no_other() -> None:
    entries = [(Domain("a", 1.0, ("the {}.",), wide=True), class_words(["cat", "tabby, tabby cat", "ox"])),
               (Domain("b", 1.0, ("the {}.",)), class_words(["dog", "cat"]))]  # fmt: skip
    shared = 0
    for seed in range(200):
        texts = step_texts(entries, [{0, 2}, {0, 1}], np.random.default_rng(seed))
        assert texts.of_class[0][1] == -1
        places = [int(p) for p in (*texts.of_class[0][[0, 2]], *texts.of_class[1])]
        assert set(places) == set(range(len(texts.texts)))
        assert len(set(texts.texts)) == len(texts.texts)
        assert "{" not in "".join(texts.texts)
        assert "ox" in texts.texts[places[1]] or "cattle" in texts.texts[places[1]]
        assert "cat" in texts.texts[places[3]]
        shared += places[0] == places[3]
    assert 0 < shared < 200  # the same caption in two domains is one text


def test_the_training_domains_share_no_image_with_those_held_out() -> None:
    trained = {tag for domain in domains() for tag in catalogue()[domain.dataset].images_of[:1]}
    assert not trained & {tag for name in HELD_OUT for tag in catalogue()[name].images_of}
    assert sum(domain.share for domain in domains()) == pytest.approx(1)


def test_the_shipped_vocabulary_holds_the_words_of_templates_and_digits() -> None:
    assert set(vocabulary([class_words([str(i) for i in range(10)])])) <= set(words())


# -- images ------------------------------------------------------------------------------------------------------------
def test_batch_sizes() -> None:
    assert batch_sizes([0.5, 0.3, 0.2], 10) == [5, 3, 2]
    assert batch_sizes([1, 1, 1], 16) == [6, 5, 5]


def test_recolour_and_augment_keep_shape_and_range() -> None:
    rng = torch.Generator().manual_seed(0)
    grey = torch.rand((64, 1, 16, 16), generator=rng)
    coloured = recolour(grey, rng)
    assert coloured.shape == (64, 3, 16, 16)
    plain = (coloured == grey).flatten(1).all(1).float().mean()
    assert 0.3 < plain < 0.7
    assert 0 <= coloured.min() <= coloured.max() <= 1
    out = augment(coloured, torch.ones(64, dtype=torch.bool), rng)
    assert out.shape == coloured.shape
    assert 0 <= out.min() <= out.max() <= 1


def test_only_rows_that_may_are_mirrored() -> None:
    ramp = torch.linspace(0, 1, 16).expand(64, 3, 16, 16)
    for allowed, mirrored in ((False, 0.0), (True, 0.5)):
        out = augment(ramp, torch.full((64,), allowed), torch.Generator().manual_seed(3))
        falls = (out[..., :4].mean((1, 2, 3)) > out[..., -4:].mean((1, 2, 3))).float().mean()
        assert float(falls) == pytest.approx(mirrored, abs=0.2 if allowed else 0)


# -- training ----------------------------------------------------------------------------------------------------------
def test_contrast_is_the_mean_of_two_cross_entropies() -> None:
    rng = torch.Generator().manual_seed(0)
    images, texts = (torch.randn((n, 8), generator=rng) for n in (6, 5))
    targets = torch.tensor([0, 1, 1, 2, 3, 4])
    own = torch.tensor([[True, True, True, False, False]] * 4 + [[False, False, False, True, True]] * 2)
    logits = 7.0 * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    everywhere = F.cross_entropy(logits, targets, label_smoothing=0.1)
    first = F.cross_entropy(logits[:4, :3], targets[:4], label_smoothing=0.1, reduction="sum")
    second = F.cross_entropy(logits[4:, 3:], targets[4:] - 3, label_smoothing=0.1, reduction="sum")
    expected = (everywhere + (first + second) / 6) / 2
    torch.testing.assert_close(contrast(images, texts, targets, own, torch.tensor(7.0), 0.1), expected)


def test_rate() -> None:
    recipe = Recipe(steps=100, warm_up=10, lr=1.0)
    assert rate(0, recipe) == pytest.approx(0.1)
    assert rate(9, recipe) == 1.0
    assert rate(55, recipe) == pytest.approx(0.5)
    assert rate(99, recipe) < 1e-3


def test_an_interrupted_run_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = digits()
    whole = model()
    train(whole, sources, RECIPE, tmp_path / "whole", device=CPU, report=lambda text: None)
    step = training.update
    done: list[int] = []

    def killed(*args: object) -> torch.Tensor:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(1)
        return step(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        train(model(), sources, RECIPE, tmp_path / "cut", device=CPU, checkpoint_every=3, report=lambda text: None)
    monkeypatch.setattr(training, "update", step)
    resumed = model()
    train(resumed, sources, RECIPE, tmp_path / "cut", device=CPU, checkpoint_every=3, report=lambda text: None)
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    start = model().state_dict()
    assert any(not torch.equal(value, start[key]) for key, value in whole.state_dict().items())
    with pytest.raises(InputError, match="other settings"):
        train(model(), sources, dataclasses.replace(RECIPE, lr=1.0), tmp_path / "cut", device=CPU)


def test_a_broken_loss_ends_the_run(tmp_path: Path) -> None:
    broken = model()
    with torch.no_grad():
        broken.net.ln_final.bias += float("nan")
    with pytest.raises(RunFailed, match="lower the learning rate"):
        train(broken, digits(), RECIPE, tmp_path, device=CPU, report=lambda text: None)


def test_export_and_zero_shot(tmp_path: Path) -> None:
    made = backbones.build("clip-small", in_shape=(3, 64, 64), seed=3, options={"pretrained": False})
    assert isinstance(made, ClipBackbone)
    path = tmp_path / "w.safetensors"
    assert export(made, ("digits", "usps"), path) == path.stat().st_size <= 12 * 2**20
    loaded = backbones.build("clip-small", in_shape=(3, 64, 64), seed=0, weights=path)
    assert isinstance(loaded, ClipBackbone)
    assert loaded.pretrained_on == ("digits", "usps")
    assert all(torch.equal(a.half().float(), b) for a, b in zip(made.parameters(), loaded.parameters(), strict=True))
    (row,) = zero_shot(loaded, ("digits",), device=CPU)
    assert (row.classes, row.images, row.chance) == (10, 359, 0.1)
    assert 0 <= row.accuracy <= 1


def test_missing_data_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLBENCH_CACHE", str(tmp_path))
    monkeypatch.delenv("CLBENCH_DATA", raising=False)
    assert main(["pretrain", "clip-small", "--out", str(tmp_path / "out")]) == 2
    assert "tiny-imagenet-subset" in capsys.readouterr().err
    assert main(["pretrain", "clip-small", "--precision", "fp8"]) == 2
    assert "unknown precision" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif("CLBENCH_DATA" not in os.environ, reason="needs the data sets of clip-small and mtil-small")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "clip-small", "--out", str(tmp_path), "--steps", "2", "--batch", "16"]) == 0
    out = capsys.readouterr().out
    assert "trained on cifar10, fashion-mnist, imagenet, pacs, usps" in out
    assert "mnist-subset" in out
