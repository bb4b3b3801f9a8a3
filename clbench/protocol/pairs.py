"""The two scenarios of the protocol, and what they share: classes, images, configuration.

D_HT (to tune on) and D_E (to evaluate on) must share neither classes nor images. Classes are those of the data set's
finest labels, so that label levels and class orders do not hide them; images are compared by their stored pixels, so
that two data sets with the same pictures are found out. Class names of different data sets are not compared: the digit
"3" of two collections is another picture each time.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clbench.errors import InputError

if TYPE_CHECKING:
    from clbench.data.store import ImageStore
    from clbench.scenarios.model import Scenario
    from clbench.scenarios.registry import Preset

__all__ = ["Overlap", "Phase", "compare", "open_phase"]

# CIFAR-100 has one picture that stands in both official halves under two labels: 1 of 60,000. More than this share of
# the evaluation images is an overlap; up to it the number is written down.
SHARED_IMAGES = 0.001


@dataclass(frozen=True)
class Phase:
    """A scenario opened for a list of seeds. scenarios: built for each order seed; stores: its data sets."""

    preset: "Preset"
    stores: "tuple[ImageStore, ...]"
    scenarios: "Mapping[int, Scenario]"

    @property
    def id(self) -> str:
        return self.preset.id

    @property
    def any(self) -> "Scenario":
        return next(iter(self.scenarios.values()))

    def describe(self) -> dict[str, Any]:
        """What a study file says of it."""
        return {
            "scenario": self.id,
            "params": {name: list(v) if isinstance(v, tuple) else v for name, v in self.preset.changed.items()},
            "datasets": [store.name for store in self.stores],
            "data_fingerprints": [store.fingerprint for store in self.stores],
            "fingerprints": {str(seed): scenario.fingerprint for seed, scenario in self.scenarios.items()},
            "num_tasks": len(self.any.tasks),
            "classes_per_task": [len(task.classes) for task in self.any.tasks],
        }


def open_phase(scenario: str, params: Mapping[str, Any], seeds: Sequence[int], data: Sequence[Path]) -> Phase:
    """Find and build a scenario for each order seed. Raises InputError for what can't be used."""
    from clbench import data as datasets
    from clbench import scenarios

    preset = scenarios.find(scenario).with_params(params)
    stores = tuple(
        datasets.load_all(preset.datasets, roots=data, order=preset.row_order, size=preset.size, scenario=preset.id)
    )
    tables = [store.table() for store in stores]
    return Phase(preset, stores, {seed: scenarios.build(preset, tables, seed) for seed in seeds})


@dataclass(frozen=True)
class Overlap:
    """classes: names of shared ones, `data set: class`. images: number of distinct pictures in both, of `of` in D_E;
    None if the stored sizes differ and pictures cannot be compared. differences: what of the configuration differs."""

    classes: tuple[str, ...]
    images: int | None
    of: int
    differences: tuple[str, ...]

    @property
    def disjoint(self) -> bool:
        return not self.classes and (self.images or 0) <= SHARED_IMAGES * self.of

    def describe(self) -> dict[str, Any]:
        return {
            "shared_classes": list(self.classes),
            "shared_images": self.images,
            "evaluation_images": self.of,
            "configuration_differs": list(self.differences),
        }

    def require_disjoint(self, tune: str, evaluate: str) -> None:
        """Raise InputError if something is shared."""
        if self.classes:
            shown = ", ".join(self.classes[:3]) + (
                f" and {len(self.classes) - 3} more" if len(self.classes) > 3 else ""
            )
            raise InputError(
                f"{tune} and {evaluate} share classes ({shown}): hyperparameters tuned on one would have seen the "
                f"other; choose halves (split-cifar100-a and -b) or two data sets, or --in-scenario, which marks the "
                f"result"
            )
        if not self.disjoint:
            raise InputError(
                f"{tune} and {evaluate} share {self.images} of {self.of} images under other names: hyperparameters "
                f"tuned on one would have seen the other; choose another data set, or --in-scenario, "
                f"which marks the result"
            )


def compare(tune: Phase, evaluate: Phase) -> Overlap:
    """What two opened scenarios share, over all of their seeds, test and validation rows included."""
    ours, theirs = rows_of(tune), rows_of(evaluate)
    shared = classes_of(tune, ours) & classes_of(evaluate, theirs)
    shapes = {store.image_shape for store in (*tune.stores, *evaluate.stores)}
    seen = pictures(evaluate, theirs)
    images = len(pictures(tune, ours) & seen) if len(shapes) == 1 else None
    return Overlap(tuple(f"{name}: {label}" for name, label in sorted(shared)), images, len(seen),
                   differences(tune, evaluate))  # fmt: skip


def rows_of(phase: Phase) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Per data set: sorted rows that any of the scenarios uses."""
    ends = np.cumsum([0, *(len(store) for store in phase.stores)])
    used = np.zeros(ends[-1], np.bool_)
    for scenario in phase.scenarios.values():
        for task in scenario.tasks:
            used[task.rows.numpy()] = True
            if task.val is not None:
                used[task.val[0].numpy()] = True
        for group in scenario.groups:
            used[group.rows.numpy()] = True
    return [np.flatnonzero(used[a:b]) for a, b in itertools.pairwise(ends.tolist())]


def classes_of(phase: Phase, rows: Sequence[np.ndarray[Any, Any]]) -> set[tuple[str, str]]:
    """(data set, finest class) of the rows."""
    return {
        (store.name, store.classes.names[label])
        for store, used in zip(phase.stores, rows, strict=True)
        for label in np.unique(store.labels.numpy()[used]).tolist()
    }


def pictures(phase: Phase, rows: Sequence[np.ndarray[Any, Any]]) -> set[bytes]:
    """sha256 of the pixels of the rows."""
    from clbench.data.loading import pixel_digests

    found: set[bytes] = set()
    for store, used in zip(phase.stores, rows, strict=True):
        images = store.images.numpy()
        for start in range(0, len(used), 4096):
            found.update(digest.tobytes() for digest in pixel_digests(images[used[start : start + 4096]]))
    return found


def differences(tune: Phase, evaluate: Phase) -> tuple[str, ...]:
    """Where the two are not of the same configuration."""
    a, b = tune.any, evaluate.any
    pairs = {
        "tasks": (len(a.tasks), len(b.tasks)),
        "classes per task": ([len(t.classes) for t in a.tasks], [len(t.classes) for t in b.tasks]),
        "setting": (a.setting, b.setting),
        "online": (a.online, b.online),
    }
    return tuple(f"{what}: {left} and {right}" for what, (left, right) in pairs.items() if left != right)
