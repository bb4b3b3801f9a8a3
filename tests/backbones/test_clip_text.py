"""Prompts of classes to classifiers, and the texts of a frozen model on disk."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_clip import tiny_clip

from clbench.backbones import clip_text
from clbench.backbones.clip_text import TextClassifier, class_texts, frozen_text_features, unit, zero_shot_weights
from clbench.errors import InputError, RunFailed

CPU = torch.device("cpu")
PROMPTS = {0: ("a photo of a {}.", "a drawing of the {}."), 1: ("the {}.",)}


def setting(names: tuple[str, ...] = ("red_fox", "owl", "0 - zero"), prompts: Any = PROMPTS) -> Any:
    return SimpleNamespace(
        classes=SimpleNamespace(names=names),
        task_classes=(torch.tensor([2, 0]), torch.tensor([1])),
        scenario_id="made-up@1",
        prompts=prompts,
    )


def test_class_texts() -> None:
    texts = class_texts(setting())
    assert texts.tasks[0].prompts == (
        ("a photo of a 0 - zero.", "a photo of a red fox."),
        ("a drawing of the 0 - zero.", "a drawing of the red fox."),
    )
    assert texts.tasks[1].prompts == (("the owl.",),)
    assert class_texts(setting(prompts={}), "one {}").tasks[1].prompts == (("one owl",),)


@pytest.mark.parametrize(
    ("names", "prompts", "template", "says"),
    [
        (("a", "b", "c"), {}, "", r"made-up@1 has an empty list of prompts for task 0.*--set"),
        (("a", "b", "c"), {0: ("{}",), 1: ()}, "", "empty list of prompts for task 1"),
        (("a", "b", "c"), PROMPTS, "a photo", "needs {}"),
        (("a", "b", "c"), {0: ("a photo",), 1: ("{}",)}, "", "'a photo' of task 0 has no {}"),
        (("11", "12", "13"), PROMPTS, "", "no class names"),
        (("a", "b", ""), PROMPTS, "", "same name, or one has none"),
        (("a", "b", "a"), PROMPTS, "", "same name"),
    ],
)
def test_bad_prompts_and_names(names: tuple[str, ...], prompts: Any, template: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        class_texts(setting(names, prompts), template)


def test_classifier_rows() -> None:
    model = tiny_clip()
    classifier = TextClassifier(model, class_texts(setting()), CPU)
    both = [unit(model.encode_text(model.tokenize([f"a photo of a {n}.", f"a drawing of the {n}."])))
            for n in ("0 - zero", "red fox")]  # fmt: skip
    weights = classifier.weights(0)
    assert weights.shape == (3, 16)
    assert not weights.requires_grad
    torch.testing.assert_close(weights[2], unit(both[0].mean(0)).detach())
    torch.testing.assert_close(weights[0], unit(both[1].mean(0)).detach())
    assert not weights[1].any()
    assert bool(classifier.weights()[1].any())
    torch.testing.assert_close(classifier.weights()[[0, 2]], weights[[0, 2]])
    trained = classifier.train_features(0)
    assert trained.requires_grad
    torch.testing.assert_close(trained[1], both[1][0])
    assert classifier.columns(0)[torch.tensor([2, 0])].tolist() == [0, 1]
    assert classifier.classes(1).tolist() == [1]


def test_frozen_texts_come_from_disk_and_follow_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_clip()
    texts = [f"a photo of the thing {i}." for i in range(7)]
    calls = []
    encode = clip_text.encode
    monkeypatch.setattr(clip_text, "encode", lambda *args: calls.append(1) or encode(*args))
    first = frozen_text_features(model, texts, CPU, tmp_path)
    assert torch.equal(frozen_text_features(model, texts, CPU, tmp_path), first)
    assert len(calls) == 1
    torch.testing.assert_close(first, unit(model.encode_text(model.tokenize(texts))).detach())
    file = next((tmp_path / "text-features").iterdir())
    content = bytearray(file.read_bytes())
    content[-3] ^= 255
    file.write_bytes(content)
    assert torch.equal(frozen_text_features(model, texts, CPU, tmp_path), first)  # damaged
    assert len(calls) == 2
    assert torch.equal(frozen_text_features(model, texts, CPU, tmp_path), first)
    assert len(calls) == 2
    frozen_text_features(model, texts[:6], CPU, tmp_path)
    with torch.no_grad():
        model.net.ln_final.bias += 0.1
    changed = frozen_text_features(model, texts, CPU, tmp_path)
    assert not torch.equal(changed, first)
    assert len(calls) == 4
    with torch.no_grad():
        model.net.ln_final.bias += float("nan")
    with pytest.raises(RunFailed, match="not finite"):
        frozen_text_features(model, texts, CPU, tmp_path)


def test_the_zero_shot_classifier_is_the_fresh_one(tmp_path: Path) -> None:
    model = tiny_clip()
    texts = class_texts(setting())
    for _ in range(2):  # computed, then from disk
        weights = zero_shot_weights(model, texts, CPU, tmp_path)
        torch.testing.assert_close(weights, TextClassifier(model, texts, CPU).weights())
    empty = dataclasses.replace(texts, tasks=texts.tasks[:1])
    assert zero_shot_weights(model, empty, CPU, tmp_path).shape == (3, 16)
