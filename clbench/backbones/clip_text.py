"""Class prompts to text features: for training, for a zero-shot classifier, and kept on disk for a frozen model.

Source: zscl card, section 2 (one template in training, all of them averaged at test) and section 5 (cached texts).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.atomic import atomic_write_bytes, explain_os_error
from clbench.backbones.backbone import fingerprint
from clbench.backbones.clip_model import ClipBackbone
from clbench.data.cache import cache_folder
from clbench.data.classes import ClassTable
from clbench.errors import InputError, RunFailed

__all__ = [
    "ClassTexts",
    "TaskTexts",
    "TextClassifier",
    "class_texts",
    "frozen_text_features",
    "unit",
    "zero_shot_weights",
]

PASS = 1024  # texts of one pass without gradients


class TextSetting(Protocol):
    """What is read of `clbench.methods.base.Setting`."""

    @property
    def classes(self) -> ClassTable: ...
    @property
    def task_classes(self) -> tuple[Tensor, ...]: ...
    @property
    def scenario_id(self) -> str: ...
    @property
    def prompts(self) -> Mapping[int, tuple[str, ...]]: ...


def unit(x: Tensor) -> Tensor:
    """Rows to length 1."""
    return F.normalize(x, dim=-1)


# -- prompts ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TaskTexts:
    """classes: (c,) int64 class ids. prompts[k][i]: the text of template k for class i; template 0 is for training."""

    classes: Tensor
    prompts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ClassTexts:
    """One entry per task."""

    tasks: tuple[TaskTexts, ...]


def class_texts(setting: TextSetting, template: str = "") -> ClassTexts:
    """The prompts of every class of every task: the scenario's templates, or `template` for all.

    Raises InputError if there are neither, if a template has no `{}`, or if the classes have no names but numbers.
    """
    where = f"scenario {setting.scenario_id}"
    if template and "{}" not in template:
        raise InputError(f"a prompt needs {{}} in the place of the class, which {template!r} has not")
    tasks = []
    for index, classes in enumerate(setting.task_classes):
        templates = (template,) if template else tuple(setting.prompts.get(index, ()))
        if not templates:
            raise InputError(
                f"{where} has an empty list of prompts for task {index}: give one for all tasks, for example "
                f'--set "prompt=a photo of a {{}}."'
            )
        broken = [text for text in templates if "{}" not in text]
        if broken:
            raise InputError(f"{where}: prompt {broken[0]!r} of task {index} has no {{}} in the place of the class")
        names = [setting.classes.names[c].replace("_", " ") for c in classes.tolist()]
        check_names(names, f"task {index} of {where}")
        tasks.append(TaskTexts(classes, tuple(tuple(text.replace("{}", n) for n in names) for text in templates)))
    return ClassTexts(tuple(tasks))


def check_names(names: Sequence[str], where: str) -> None:
    """Refuse classes that nothing names: empty names, or numbers beyond the ten digits."""
    if any(not name.strip() for name in names) or (len(names) > 1 and len(set(names)) < len(names)):
        raise InputError(f"{where}: two classes have the same name, or one has none, so texts cannot tell them apart")
    if all(name.strip().isdecimal() for name in names) and any(int(name) > 9 for name in names):
        raise InputError(
            f"{where}: its classes are called {names[0]}, {names[1]} ...: the data set has no class names, which a "
            f"text encoder needs; put them into its metadata (docs/data.md), or choose another data set"
        )


# -- classifiers -----------------------------------------------------------------------------------------------------
class TextClassifier:
    """The class texts of a scenario as tokens on the device, and the classifiers that a model makes of them."""

    def __init__(self, model: ClipBackbone, texts: ClassTexts, device: torch.device) -> None:
        self.model = model
        self.num_classes = 1 + max(int(task.classes.max()) for task in texts.tasks if len(task.classes))
        self._classes = [task.classes.to(device) for task in texts.tasks]
        self._tokens = [[model.tokenize(row).to(device) for row in task.prompts] for task in texts.tasks]
        self._columns = []
        for classes in self._classes:
            columns = torch.zeros(self.num_classes, dtype=torch.int64, device=device)
            columns[classes] = torch.arange(len(classes), device=device)
            self._columns.append(columns)

    def classes(self, task: int) -> Tensor:
        """(c,) int64 class ids of a task."""
        return self._classes[task]

    def columns(self, task: int) -> Tensor:
        """(C,) int64: where a class stands in `classes(task)`; 0 for classes of other tasks."""
        return self._columns[task]

    def train_features(self, task: int, template: int = 0) -> Tensor:
        """(c, D) of length 1, with gradients, in the order of `classes(task)`."""
        return unit(self.model.encode_text(self._tokens[task][template]))

    @torch.no_grad()
    def weights(self, task: int | None = None, model: ClipBackbone | None = None) -> Tensor:
        """(C, D) float32: mean over the templates of unit text features, again of length 1, in the rows of the classes
        of `task` (None: of every task); zeros elsewhere. model: another one than the classifier was made with."""
        model = model or self.model
        weights: Tensor | None = None
        for index in range(len(self._classes)) if task is None else [task]:
            rows = unit(torch.stack([unit(encode(model, tokens)) for tokens in self._tokens[index]]).mean(0))
            if weights is None:
                weights = rows.new_zeros((self.num_classes, rows.shape[1]))
            weights.index_copy_(0, self._classes[index], rows)
        assert weights is not None
        return weights


def encode(model: ClipBackbone, tokens: Tensor) -> Tensor:
    """(N, L) -> (N, D) float32 without gradients, in passes."""
    return torch.cat([model.encode_text(part).float() for part in torch.split(tokens, model.micro_texts or PASS)])


# -- a frozen model's texts, kept on disk ----------------------------------------------------------------------------
@torch.no_grad()
def frozen_text_features(
    model: ClipBackbone,
    texts: Sequence[str],
    device: torch.device,
    cache_dir: Path | None = None,
    *,
    model_key: str | None = None,
) -> Tensor:
    """(N, D) float32 of length 1 on `device`, float32 arithmetic; read from `<cache>/text-features` if they are there.

    The key is a hash of the model's state as it is now (`model_key`, where the caller has it), of the tokens, of the
    device's kind and the version of torch. A file that is damaged is made again. Raises RunFailed for features that are
    not finite.
    """
    tokens = model.tokenize(texts)
    parts = [
        model_key or fingerprint(model),
        hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        str(tuple(tokens.shape)),
        device.type,
        torch.__version__,
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    path = (cache_dir or cache_folder()) / "text-features" / f"{key[:32]}.safetensors"
    found = read(path, key)
    if found is None:
        with torch.autocast(device.type, enabled=False):
            found = unit(encode(model, tokens.to(device))).cpu()
        if not bool(torch.isfinite(found).all()):
            raise RunFailed(f"text features of {model.name} are not finite: check its weights")
        write(path, key, found)
    return found.to(device)


def zero_shot_weights(
    model: ClipBackbone, texts: ClassTexts, device: torch.device, cache_dir: Path | None = None
) -> Tensor:
    """(C, D): `TextClassifier.weights(None)` of a frozen model, through the cache."""
    model_key = fingerprint(model)
    count = 1 + max(int(task.classes.max()) for task in texts.tasks if len(task.classes))
    weights = torch.zeros((count, model.num_features), device=device)
    for task in texts.tasks:
        rows = [text for prompts in task.prompts for text in prompts]
        features = frozen_text_features(model, rows, device, cache_dir, model_key=model_key)
        mean = features.view(len(task.prompts), len(task.classes), -1).mean(0)
        weights.index_copy_(0, task.classes.to(device), unit(mean))
    return weights


def read(path: Path, key: str) -> Tensor | None:
    """The features of a cache file, None if there are none or the file is not what it should be."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            features: Tensor = file.get_tensor("features")
    except (OSError, SafetensorError, ValueError):
        return None
    digest = hashlib.sha256(features.numpy().tobytes()).hexdigest()
    return features if facts.get("key") == key and facts.get("sha256") == digest else None


def write(path: Path, key: str, features: Tensor) -> None:
    from safetensors.torch import save

    digest = hashlib.sha256(features.numpy().tobytes()).hexdigest()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(path, save({"features": features.contiguous()}, {"key": key, "sha256": digest}))
    except OSError as error:
        raise explain_os_error(error, path, f"keep {features.nbytes / 1e6:.0f} MB of text features in") from error
