"""Reference sets: rows, texts, fit, and the guard against images of the scenario."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clbench import data
from clbench.errors import InputError
from clbench.learner.reference import find_reference, read_texts
from clbench.methods.base import ReferenceSpec
from clbench.methods.zscl import ZSCL


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets of 8 x 8 grey images: `things` (3 classes, 9 + 3 rows) and `wide` (16 x 16)."""
    root = tmp_path_factory.mktemp("reference")
    rng = np.random.default_rng(0)
    for name, side in (("things", 8), ("wide", 16)):
        for label in ("red_fox", "oak tree", "barn"):
            for part, count in (("train", 3), ("test", 1)):
                folder = root / name / part / label
                folder.mkdir(parents=True)
                for i in range(count):
                    Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def digits() -> data.ImageStore:
    return data.load("digits")


def spec(images: object, texts: tuple[str, ...] = ("digits",), **more: object) -> ReferenceSpec:
    return ReferenceSpec((str(images),), texts, **more)


def test_images_and_texts(folders: Path, digits: data.ImageStore) -> None:
    found = find_reference(spec(folders / "things"), digits, view="", size=None)
    reference = found.reference
    assert reference.num_images == 12
    assert reference.texts[3] == "a photo of a 3."
    assert reference.read(torch.tensor([0, 11])).shape == (2, 1, 8, 8)
    assert found.overlap is None
    assert found.document["images"] == ["things"]
    assert found.document["num_texts"] == 10


def test_rows_of_one_split_and_a_limit(folders: Path, digits: data.ImageStore) -> None:
    sizes = {}
    prints = set()
    for name, more in {"all": {}, "train": {"rows": "train"}, "test": {"rows": "test"}, "few": {"limit": 5}}.items():
        found = find_reference(spec(folders / "things", **more), digits, view="", size=None)
        sizes[name] = found.reference.num_images
        prints.add(found.reference.fingerprint)
    assert sizes == {"all": 12, "train": 9, "test": 3, "few": 5}
    assert len(prints) == 4, "what is read decides the fingerprint"
    again = find_reference(spec(folders / "things", limit=5), digits, view="", size=None)
    assert again.reference.fingerprint in prints, "the limit draws the same rows every time"


def test_images_of_another_size(folders: Path, digits: data.ImageStore) -> None:
    with pytest.raises(InputError, match=r"reference images of wide are 1x16x16 .* the scenario 1x8x8"):
        find_reference(spec(folders / "wide"), digits, view="", size=None)
    for fitting in ({"view": "resize(8)", "size": None}, {"view": "", "size": 8}):
        found = find_reference(spec(folders / "wide"), digits, **fitting)
        assert found.reference.read(torch.tensor([0])).shape == (1, 1, 8, 8)


def test_images_of_the_scenario_are_refused_or_marked(digits: data.ImageStore) -> None:
    with pytest.raises(InputError, match=r"no longer zero-shot; choose another reference .*--allow-contamination"):
        find_reference(spec("digits"), digits, view="", size=None)
    found = find_reference(spec("digits"), digits, view="", size=None, allowed=True)
    assert found.overlap is not None
    assert found.document["overlap"] == found.overlap


def test_what_the_backbone_was_trained_on_is_told(digits: data.ImageStore) -> None:
    found = find_reference(spec("digits"), digits, view="", size=None, allowed=True, pretrained_on=("digits",))
    assert "pretrained on digits" in found.document["pretrained"]
    found = find_reference(spec("digits"), digits, view="", size=None, allowed=True, pretrained_on=("imagenet",))
    assert found.document["pretrained"] is None


def test_sources_of_texts(tmp_path: Path) -> None:
    names = read_texts("imagenet-names")
    assert len(names) == 1000
    assert names[0] == "a photo of a tench."
    assert read_texts("cifar100")[1] == "a photo of a aquarium fish.", "of the finest level, first template"
    (tmp_path / "words.txt").write_text("one sentence\n\nanother\n")
    (tmp_path / "captions.tsv").write_text("a dog runs\thttp://a\na cat sits\thttp://b\n")
    assert read_texts(str(tmp_path / "words.txt")) == ["one sentence", "another"]
    assert read_texts(str(tmp_path / "captions.tsv")) == ["a dog runs", "a cat sits"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "\n \n", "holds no sentences"),
        ("gone.txt", None, "cannot read reference texts"),
        ("imagenet-name", None, "did you mean 'imagenet-names'"),
    ],
)
def test_texts_that_cannot_be_used(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    where = str(tmp_path / name) if name.endswith(".txt") else name
    with pytest.raises(InputError, match=words):
        read_texts(where)


def test_an_empty_reference_is_refused(folders: Path, digits: data.ImageStore) -> None:
    with pytest.raises(InputError, match="has no texts"):
        find_reference(ReferenceSpec((str(folders / "things"),), ()), digits, view="", size=None)
    with pytest.raises(InputError, match="has no images"):
        find_reference(ReferenceSpec((), ("digits",)), digits, view="", size=None)


def test_zscl_asks_for_one_only_where_it_distils() -> None:
    assert ZSCL.reference(ZSCL.Config()) is not None
    assert ZSCL.reference(ZSCL.Config(image_weight=0.0, text_weight=0.0)) is None
    assert ZSCL.reference(ZSCL.Config(image_weight=0.0, text_weight=0.0, negatives=5)) is not None
