"""Scenarios to and from Avalanche (avalanche-lib 0.6), which is imported only when one of the two is called."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clbench.data.store import ImageStore
from clbench.errors import InputError
from clbench.interop.rows import RowDataset, ViewTransform, check_store, view_of
from clbench.interop.samples import Samples, scenario_from_samples
from clbench.scenarios.model import Scenario, SettingName

if TYPE_CHECKING:
    from avalanche.benchmarks import CLScenario, DatasetExperience

__all__ = ["from_avalanche", "to_avalanche"]


def require_avalanche() -> None:
    """Raise InputError unless Avalanche can be imported."""
    try:
        import avalanche.benchmarks  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"Avalanche cannot be imported ({error}); install it with `pip install 'clbench[avalanche]'`"
        ) from None


def to_avalanche(
    scenario: Scenario, store: ImageStore, *, train_view: str | None = None, test_view: str | None = None,
    rows_in_minibatch: bool = True,
) -> "CLScenario":  # fmt: skip
    """The scenario as an Avalanche benchmark with `train_stream`, `test_stream` and, if tasks keep out validation rows,
    `valid_stream`.

    One training (and validation) experience per task, one test experience per group, in our order. Every sample is
    (image, target, row, task label): the image (C, h, w) float32 through its domain and view, our class id, the row of
    the store, and 0 or, in the setting `task`, the task's index. So a strategy's minibatch is [x, y, rows, t]. Rows
    that a stream repeats are repeated. The views are transform groups: `train` has the training view, `eval` the test
    view; random ones draw from torch's global generator.

    Avalanche's strategies shuffle: `strategy.train(experience, shuffle=False)` keeps the order of an online stream. An
    empty task (Si-Blurry may draw one) is an empty experience, which they can train only without shuffling.

    Experiences carry `name`, and test experiences `answers`, the class ids an answer may come from. The benchmark
    carries `scenario` and `n_classes`.

    rows_in_minibatch: False leaves the rows out of it: [x, y, t], as some strategies (DER) want it.
    store: of the scenario's data set, or of several joined by `clbench.data.join.join`; samples are the host's wherever
    it lies, since loaders take them one by one. Views: the scenario's if None.
    Raises InputError if Avalanche is missing, or if views or store do not fit.
    """
    require_avalanche()
    from avalanche.benchmarks import CLScenario, DatasetExperience, EagerCLStream
    from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
    from avalanche.benchmarks.scenarios.task_aware import with_task_labels

    store = store.to("cpu")
    check_store(scenario, store)
    defaults = scenario.defaults
    views = {
        "train": view_of(defaults.train_view if train_view is None else train_view, store, "train_view"),
        "eval": view_of(defaults.test_view if test_view is None else test_view, store, "test_view"),
    }
    by_task = scenario.setting == "task"

    def experience(
        rows: Tensor, targets: Tensor, domain: Tensor | None, task: int | None, name: str, group: str, **extra: Any
    ) -> "DatasetExperience[Any]":
        images = RowDataset(store, rows, targets, domain, scenario.domains)
        label = task if by_task and task is not None else 0
        made = DatasetExperience(dataset=avalanche_dataset(images, label, views, group, rows_in_minibatch))
        for key, value in {"name": name, **extra}.items():
            setattr(made, key, value)
        return made

    train, valid = [], []
    for index, task in enumerate(scenario.tasks):
        name = task.name or f"task {index}"
        train.append(experience(task.rows, task.targets, task.domain, index, name, "train"))
        if task.val is not None:
            valid.append(experience(*task.val, None, index, name, "eval"))
    test = [
        experience(g.rows, g.targets, g.domain, g.task, g.name, "eval", answers=tuple(g.classes.tolist()))
        for g in scenario.groups
    ]
    streams = {"train": train, **({"valid": valid} if valid else {}), "test": test}
    benchmark = with_classes_timeline(CLScenario([EagerCLStream(name, made) for name, made in streams.items()]))
    if by_task:
        benchmark = with_task_labels(benchmark)
    benchmark.scenario = scenario
    benchmark.n_classes = scenario.num_classes
    return benchmark


def avalanche_dataset(
    images: RowDataset, task_label: int, views: dict[str, ViewTransform], group: str, rows_in_minibatch: bool
) -> Any:
    """An Avalanche data set whose samples are (image, target, row, task label)."""
    from avalanche.benchmarks.utils import DataAttribute, TaskLabels
    from avalanche.benchmarks.utils.classification_dataset import TaskAwareSupervisedClassificationDataset
    from avalanche.benchmarks.utils.flat_data import ConstantSequence
    from avalanche.benchmarks.utils.transform_groups import TransformGroups

    labels = ConstantSequence(task_label, len(images)) if len(images) else []
    return TaskAwareSupervisedClassificationDataset(
        [images],
        data_attributes=[  # in this order: Avalanche takes the last entry of a minibatch for the task label
            DataAttribute(images.targets, "targets"),
            DataAttribute(images.rows, "rows", use_in_getitem=rows_in_minibatch),
            TaskLabels(labels),
        ],
        transform_groups=TransformGroups(views, current_group=group),
    )


def from_avalanche(
    train_experiences: "Iterable[DatasetExperience[Any]]",
    test_experiences: "Iterable[DatasetExperience[Any]]",
    valid_experiences: "Iterable[DatasetExperience[Any]] | None" = None,
    *,
    name: str,
    setting: SettingName | None = None,
    online: bool = False,
    class_names: Sequence[str] | None = None,
) -> tuple[ImageStore, Scenario]:
    """A store and a scenario from lists of Avalanche's experiences (a stream is such a list).

    The data sets are read without their transform groups, so without augmentation and normalisation; frozen transforms
    stay. Images may be PIL images, uint8 tensors (C, H, W), or float tensors in [0, 1], which become 8 bit. All must
    have one size, and fit into memory. Samples that came from `to_avalanche` are known by their rows again.

    The rest is as `scenario_from_samples` says: setting, groups, order of rows. class_names: by target; `class 7` if
    None. online: whether the order inside the training experiences counts.
    Raises InputError for experiences that cannot be used.
    """
    require_avalanche()
    where = f"import {name!r}"
    read = [
        [samples_of(item, f"{where}: {kind} experience {index}") for index, item in enumerate(experiences)]
        for kind, experiences in (
            ("training", train_experiences), ("test", test_experiences), ("validation", valid_experiences or ()),
        )
    ]  # fmt: skip
    train, test, valid = read
    return scenario_from_samples(
        train, test, None if valid_experiences is None else valid,
        name=name, setting=setting, online=online, class_names=class_names,
    )  # fmt: skip


def samples_of(experience: Any, where: str) -> Samples:
    """One experience read whole."""
    dataset: Any = getattr(experience, "dataset", None)
    if not hasattr(dataset, "targets"):
        raise InputError(f"{where} has no data set with targets; give DatasetExperiences of a supervised benchmark")
    targets = np.array([int(target) for target in dataset.targets], dtype=np.int64)
    labels = {int(label) for label in getattr(dataset, "targets_task_labels", ())} or {0}
    if len(labels) > 1:
        raise InputError(f"{where} mixes task labels {', '.join(map(str, sorted(labels)))}; split it into one for each")
    rows = getattr(dataset, "rows", None)
    plain = dataset.replace_current_transform_group(None)
    images = [as_bytes(plain[index][0], f"{where}, sample {index}") for index in range(len(plain))]
    for index, image in enumerate(images):
        if image.shape != images[0].shape:
            this, first = ("x".join(map(str, size)) for size in (image.shape, images[0].shape))
            raise InputError(
                f"{where}: sample {index} is {this}, sample 0 is {first}; bring all images to one size first"
            )
    return Samples(
        images=np.stack(images) if images else np.empty((0, 1, 1, 1), np.uint8),
        targets=targets,
        task_label=labels.pop(),
        rows=None if rows is None else np.array(list(rows), dtype=np.int64),
        name=getattr(experience, "name", ""),
        answers=getattr(experience, "answers", None),
    )


def as_bytes(image: Any, where: str) -> NDArray[np.uint8]:
    """(C, H, W) uint8 of a PIL image or a tensor."""
    if hasattr(image, "getbands"):  # PIL
        grey = image.mode == "L"
        array = np.asarray(image if grey else image.convert("RGB"))
        return array[None] if grey else array.transpose(2, 0, 1)
    if not isinstance(image, Tensor) or image.ndim not in (2, 3):
        raise InputError(f"{where}: the image must be a PIL image or a tensor (C, H, W), not {type(image).__name__}")
    image = image if image.ndim == 3 else image[None]
    if image.dtype == torch.uint8:
        return np.asarray(image.cpu().numpy())
    if not image.is_floating_point() or image.min() < 0 or image.max() > 1:
        raise InputError(
            f"{where}: the image must be uint8 or in [0, 1], not {image.dtype} from {float(image.min()):.3g} to "
            f"{float(image.max()):.3g}; leave normalisation to the view"
        )
    return np.asarray((image * 255).round().to(torch.uint8).cpu().numpy())
