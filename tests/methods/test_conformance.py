"""`clbench check` passes for every method of the package, and fails for each kind of mistake it is there to find."""

import textwrap
from pathlib import Path

import pytest

from clbench.errors import InputError
from clbench.learner.check import check_method
from clbench.methods.registry import builtin_names, find, list_methods

GOOD = '''
"""A tiny method."""
import torch
from dataclasses import dataclass
from torch import nn
from torch.nn import functional as F
from clbench.methods.base import Method, hp


@dataclass(frozen=True)
class Config:
    lr: float = hp(0.1, "learning rate", low=0.0)


class Mine(Method):
    Config = Config

    def __init__(self, config, backbone, setting):
        super().__init__(config, backbone, setting)
        self.classifier = nn.Linear(backbone.num_features, setting.num_classes)
        self.optimizer = torch.optim.SGD([*backbone.parameters(), *self.classifier.parameters()], lr=config.lr)
        self.count = 0

    def step(self, batch):
        loss = F.cross_entropy(self.classifier(self.backbone(batch.images)), batch.targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}

    def classify(self, features, allowed, task):
        return self.classifier(features)


METHOD = Mine
'''


def write(folder: Path, source: str, name: str = "mine.py") -> str:
    path = folder / name
    path.write_text(textwrap.dedent(source))
    return str(path)


@pytest.mark.parametrize("name", builtin_names())
def test_builtin_methods_conform(name: str) -> None:
    failed = [check for check in check_method(name) if not check.ok]
    assert not failed, failed


def test_a_good_file_conforms(tmp_path: Path) -> None:
    assert all(check.ok for check in check_method(write(tmp_path, GOOD)))


MISTAKES = {
    "undeclared hyperparameter": ('hp(0.1, "learning rate", low=0.0)', "0.1", "declares"),
    "host read": ('return {"loss": loss.detach()}', 'return {"loss": torch.tensor(loss.item())}', "host"),
    "branch on a value": ("loss.backward()", "if loss > 100: return {}\n        loss.backward()", "host"),
    "state left out": (
        "loss = F.cross", "self._n = getattr(self, '_n', 0) + 1\n        loss = self._n * F.cross", "resumes",
    ),
    "not a function of the seed": (
        "loss = F.cross", "import os\n        loss = (1 + os.urandom(1)[0] / 99) * F.cross", "same seed",
    ),
    "answering changes the weights": (
        "return self.classifier(features)",
        "self.classifier.bias.data.add_(0.01)\n        return self.classifier(features)", "evaluated",
    ),
    "answering writes into the images, and PyTorch does not count it": (
        "def classify", "def features(self, images, task):\n        images.data.mul_(0.5)\n"
        "        return self.backbone(images)\n\n    def classify", "evaluated",
    ),
    "infinite logits": (
        "return self.classifier(features)", "return self.classifier(features).masked_fill(~allowed, 0) / 0.0", "finite",
    ),
    "wrong shape": ("return self.classifier(features)", "return self.classifier(features)[:, :3]", "finite"),
    "what a checkpoint can't hold": ("self.count = 0", "self.count = object()", "resumes"),
    "memory in strings": ("METHOD = Mine", "Mine.memory_bytes = lambda self: {'x': 'much'}\nMETHOD = Mine", "memory"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_found(tmp_path: Path, mistake: str) -> None:
    old, new, check = MISTAKES[mistake]
    assert old in GOOD
    failed = [c.name for c in check_method(write(tmp_path, GOOD.replace(old, new))) if not c.ok]
    assert any(check in name for name in failed), failed


def test_listing_agrees_with_the_classes() -> None:
    """What `list` reads from the source is what importing gives."""
    from clbench.methods.base import config_fields

    for entry in list_methods():
        cls = find(entry["id"]).cls
        assert entry["settings"] == sorted(cls.settings)
        fields = config_fields(cls.Config)
        assert {h["name"]: h["help"] for h in entry["hyperparameters"]} == {
            n: f.metadata["help"] for n, f in fields.items()
        }
        for shown in entry["hyperparameters"]:
            assert shown["default"] == fields[shown["name"]].default
        assert entry["title"], entry["id"]


@pytest.mark.parametrize("spelling", ["er", "ER", "experience-replay", "Experience_Replay"])
def test_usual_spellings_find_the_method(spelling: str) -> None:
    assert find(spelling).id == "er"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1", "defines no METHOD"),
        ("METHOD = 3", "lacks"),
        ("def f(:\n  pass", "line 1"),
        ("import not_a_module_at_all", "line 1"),
        ("\n\nraise ValueError('oops')", "line 3: ValueError: oops"),
    ],
)
def test_files_that_are_no_method(tmp_path: Path, source: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        find(write(tmp_path, source))


def test_unknown_and_missing_names() -> None:
    with pytest.raises(InputError, match=r"unknown method 'slcaa'; did you mean 'slca'"):
        find("slcaa")
    with pytest.raises(InputError, match="does not exist"):
        find("nowhere/mine.py")
