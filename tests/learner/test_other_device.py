"""Every method keeps to its device: what a GPU would refuse, found without one (see `other_device.py`)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

from clbench.learner.check import NARROW, VIEWS, finished, has_reference
from clbench.learner.spec import RunSpec
from clbench.methods import registry
from clbench.methods.registry import builtin_names

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch cannot be told of a device in Python",
)


# point parameters into one flat tensor (`parameter.data = ...`), which tensors that hold others do not follow
POINTING = {"clr", "exssnet", "ssnet", "supsup"}


def spec(name: str, **changes: Any) -> dict[str, Any]:
    found = registry.find(name).cls
    view = VIEWS.get(found.small_backbone, "")
    setting = {} if "class" in found.settings else {"setting": "task"}
    return {
        "method": name, "scenario": "split-digits", "scenario_params": {"per_class": 24, **setting}, "set": found.quick,
        "epochs": 1, "eval_every": 3, "eval_per_group": 20, "train_view": view, "test_view": view,
        "allow_contamination": has_reference(found, {}),
        "backbone": None if found.frozen_backbone is True else found.small_backbone,
        "backbone_options": NARROW.get(found.small_backbone, {}), **changes,
    }  # fmt: skip


def on_the_other_device(*specs: dict[str, Any]) -> list[dict[str, Any]]:
    worker = Path(__file__).with_name("other_device.py")
    given = [sys.executable, str(worker), *map(json.dumps, specs)]
    ended = subprocess.run(given, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout)


def assert_as_on_the_cpu(wanted: list[dict[str, Any]]) -> None:
    for given, each in zip(wanted, on_the_other_device(*wanted), strict=True):
        assert each["problems"] == {}, given["method"]
        assert each["devices"] in (["other:0"], []), given["method"]  # none: only features are kept
        if given["method"] in POINTING:
            continue
        learner = finished(RunSpec(device="cpu", **given))
        assert each["hits"] == [int(hits.sum()) for _, hits in learner.matrix], given["method"]


def test_a_run_keeps_to_its_device_and_is_that_of_the_cpu() -> None:
    assert_as_on_the_cpu(
        [
            spec("er", train_view="pad_crop(1) flip"),
            spec("er", evaluator="snapshot", eval_every=1),
            spec("finetune", scenario="rotated-digits", scenario_params={"per_class": 24}),
        ]
    )


MISTAKES = {
    "torch.zeros(10)": "aten.add.Tensor on tensors of two devices",
    "torch.rand(10, device=features.device, generator=torch.Generator().manual_seed(1))": (
        "aten.rand.generator with a generator of another device"
    ),
}


def test_mistakes_are_found(tmp_path: Path) -> None:
    specs = []
    for number, term in enumerate(MISTAKES):
        file = tmp_path / f"mistaken{number}.py"
        file.write_text(
            "import torch\n"
            "from clbench.methods.finetune import Finetune\n\n\n"
            "class Mistaken(Finetune):\n"
            "    def classify(self, features, allowed, task):\n"
            f"        return super().classify(features, allowed, task) + 0 * {term}\n\n\n"
            "METHOD = Mistaken\n"
        )
        specs.append(spec("finetune", eval_every=0) | {"method": str(file)})
    for found, message in zip(on_the_other_device(*specs), MISTAKES.values(), strict=True):
        assert any(message in problem for problem in found["problems"]), found


@pytest.mark.slow
@pytest.mark.parametrize("name", builtin_names())
def test_every_method_keeps_to_its_device(name: str) -> None:
    assert_as_on_the_cpu([spec(name)])
