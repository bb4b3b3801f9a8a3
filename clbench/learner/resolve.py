"""Look up everything a run needs, before anything starts: method, data, scenario, backbone, hyperparameters, sizes.

Precedence is one rule everywhere: the scenario's or field's default < the paper's recipe for (method, scenario) < what
the user gave. The source of each value is kept beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from clbench import backbones, data, scenarios
from clbench.backbones.backbone import Backbone
from clbench.backbones.catalogue import EMBEDDED, is_clip
from clbench.backbones.factory import parse_option
from clbench.data.join import join
from clbench.data.reader import Reader
from clbench.data.store import ImageStore
from clbench.errors import InputError, unknown_name
from clbench.evaluator import Evaluator, Schedule, fit_schedule
from clbench.evaluator.evaluator import HeadCounts, Mask
from clbench.evaluator.parts import PartsEvaluator
from clbench.learner.graphed_step import check_graphable
from clbench.learner.reference import FoundReference, find_reference
from clbench.learner.spec import RunSpec
from clbench.methods import registry
from clbench.methods.base import Method, Reference, Setting
from clbench.methods.config import make_config
from clbench.rng import derive_seed, generator
from clbench.scenarios.families import FAMILIES
from clbench.scenarios.model import Scenario
from clbench.stream import Plan, Stream

__all__ = ["Resolved", "make_method", "resolve"]


VIEWS = ("train_view", "test_view")
RESIDENT: WeakValueDictionary[tuple[str, str, str], ImageStore] = WeakValueDictionary()


@dataclass(frozen=True)
class Choice:
    """A value and where it came from: `--option`, `recipe: ...`, `scenario`, `default`."""

    value: Any
    source: str


@dataclass
class Resolved:
    """A run with everything found. `document` is what `spec.json` holds: every value with its source.

    identity: the part of it that decides the result; its hash is the run id.
    """

    spec: RunSpec
    found: registry.FoundMethod
    scenario: Scenario
    store: ImageStore
    reader: Reader
    backbone: Backbone
    config: Any
    device: torch.device
    mask: Mask
    stream: Stream
    method: Method
    plans: list[list[Plan]]
    schedule: Schedule
    per_group: int
    identity: dict[str, Any]
    document: dict[str, Any]

    def evaluator(self) -> Evaluator:
        """A fresh evaluator, its table large enough for the whole run."""
        tasks = [
            (sum(plan.steps for plan in plans), len(task.rows))
            for plans, task in zip(self.plans, self.scenario.tasks, strict=True)
        ]
        return PartsEvaluator(
            self.scenario,
            self.reader,
            view=self.method.view,
            mask=self.mask,
            per_group=self.per_group,
            slots=1 + sum(self.schedule.count(steps, rows) + 1 for steps, rows in tasks),
            seed=self.spec.seed,
            device=self.device,
            chunk=self.spec.eval_batch if isinstance(self.spec.eval_batch, int) else None,
            engine=self.spec.evaluator,
            head_counts=fused_counts() if self.spec.fused else None,
        )

    def feature_rows(self) -> Tensor:
        """Sorted store rows that the scenario uses: what the features of a frozen backbone are needed for."""
        parts = [task.rows for task in self.scenario.tasks] + [group.rows for group in self.scenario.groups]
        parts += [task.val[0] for task in self.scenario.tasks if task.val is not None]
        rows: Tensor = torch.cat(parts).unique()
        return rows


def resolve(spec: RunSpec) -> Resolved:
    """Find everything `spec` names. Nothing is written but data caches. Raises InputError for what can't be used."""
    device = find_device(spec.device)
    found = registry.find(spec.method)
    check_speed_options(spec, device, found)
    preset = scenarios.find(spec.scenario).with_params(spec.scenario_params)
    recipe = registry.find_recipe(found, preset.id)
    stores = data.load_all(
        preset.datasets, roots=spec.data, order=preset.row_order, size=preset.size, scenario=preset.id
    )
    order_seed = spec.seed if spec.order_seed is None else spec.order_seed
    scenario = scenarios.build(preset, [store.table() for store in stores], order_seed)
    store = on_device(join(stores), device)
    check_setting(found, scenario)

    config, hyperparameters = make_config(
        found.cls.Config,
        {**({f"recipe: {recipe.source}": recipe.set} if recipe else {}), "--set": spec.set},
        f"method {found.id}",
    )
    options = run_options(spec, recipe, scenario, found.cls)
    name, backbone_options, weights = backbone_choice(spec, recipe, store, found, preset.family)
    for_texts = is_clip(name.value) and bool(scenario.prompts)
    choose_native_views(options, name.value, spec.weights, backbone_options.value, for_texts)
    views = {"train": options["train_view"].value, "test": options["test_view"].value}
    network = backbones.build(
        name.value, in_shape=input_shape(store, views["test"]), seed=spec.seed, weights=spec.weights,
        options=backbone_options.value,
    )  # fmt: skip
    contaminated = check_contamination(network, store, name.value, spec.allow_contamination)
    fingerprint = str(network.fingerprint)
    reader = fused_reader(store, views, scenario.domains) if spec.fused else Reader(store, views, scenario.domains)
    extra = reference_of(found, config, spec, store, views["test"], preset.size, network)

    stream = Stream(
        scenario, reader, seed=spec.seed, device=device,
        batch_size=options["batch_size"].value, epochs=options["epochs"].value,
        updates=options["updates_per_batch"].value,
    )  # fmt: skip
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks this form
    method = make_method(found.cls, config, network, scenario, stream, extra.reference if extra else None)
    mask: Mask = "task" if scenario.setting == "task" else options["mask"].value
    plans = [
        [stream.plan(index, phase, number) for number, phase in enumerate(method.phases(task, index))]
        for index, task in enumerate(scenario.tasks)
    ]
    per_group = options["eval_per_group"].value
    schedule, schedule_source = make_schedule(spec, scenario, plans, per_group)
    identity = {
        "method": found.id,
        "method_file": found.digest or None,
        "hyperparameters": {key: entry["value"] for key, entry in hyperparameters.items()},
        "scenario": scenario.id,
        "scenario_fingerprint": scenario.fingerprint,
        "data_fingerprint": store.fingerprint,
        "seed": spec.seed,
        "order_seed": order_seed,
        "backbone": name.value,
        "backbone_options": dict(backbone_options.value),
        "backbone_fingerprint": fingerprint,
        "train_view": views["train"],
        "test_view": views["test"],
        "batch_size": stream.batch_size,
        "epochs": stream.epochs,
        "updates_per_batch": stream.updates,
        "mask": mask,
        "eval_every": schedule.every,
        "eval_dense": schedule.dense,
        "eval_per_group": per_group,
        "precision": spec.precision,
        "device_type": device.type,
    }
    identity |= {key: True for key in ("compile", "cuda_graph", "fused") if getattr(spec, key)}
    if spec.compile:
        network.compile(dynamic=False)
    if schedule.samples is not None:
        identity["eval_samples"] = schedule.samples
    if extra is not None:
        identity["reference_fingerprint"] = extra.reference.fingerprint
    document = {
        **identity,
        "hyperparameters": hyperparameters,
        "evaluator": spec.evaluator,
        "eval_batch": spec.eval_batch,
        "setting": scenario.setting,
        "scenario_params": {key: plain(value) for key, value in scenario.params.items()},
        "datasets": list(scenario.datasets),
        "num_tasks": len(scenario.tasks),
        "num_classes": scenario.num_classes,
        "weights": spec.weights.name if spec.weights else None,
        "pretrained_on": list(network.pretrained_on),
        "contaminated": "; ".join(filter(None, (contaminated, extra.overlap if extra else None))) or None,
        "recipe": recipe.source if recipe else None,
        "protocol_family": preset.family,
        "protocol_changes": protocol_changes(preset, options, name.value, backbone_options.value),
        "sources": {
            "backbone": name.source,
            "weights": weights,
            "backbone_options": backbone_options.source,
            "eval_every": schedule_source,
            **{key: choice.source for key, choice in options.items()},
        },
    }
    if extra is not None:
        document["reference"] = extra.document
    return Resolved(
        spec, found, scenario, store, reader, network, config, device, mask, stream, method, plans, schedule, per_group,
        identity, document,
    )  # fmt: skip


def on_device(store: ImageStore, device: torch.device) -> ImageStore:
    """The store on `device`; runs of one process that live at the same time share one copy of the images on a GPU."""
    if device.type == "cpu":
        return store.to(device)
    key = (store.name, store.fingerprint, str(device))
    resident = RESIDENT.get(key)
    if resident is None:
        resident = RESIDENT[key] = store.to(device)
    return resident


def find_device(name: str) -> torch.device:
    """`auto`: CUDA if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise unknown_name("device", name, ["auto", "cpu", "cuda"]) from None
    if device.type not in ("cpu", "cuda"):
        raise unknown_name("device", name, ["auto", "cpu", "cuda"])
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {name} is not there (CUDA devices found: {torch.cuda.device_count()}); use --device cpu or auto"
        )
    return device


def check_speed_options(spec: RunSpec, device: torch.device, found: registry.FoundMethod) -> None:
    """Refuse what needs a GPU elsewhere, and graphs of steps that cannot be captured."""
    wanted = {"--evaluator graph": spec.evaluator == "graph", "--fused": spec.fused, "--cuda-graph": spec.cuda_graph}
    for option, asked in wanted.items():
        if asked and device.type != "cuda":
            raise InputError(f"{option} needs a CUDA device, but this run is on the {device.type}; leave it out")
    if spec.cuda_graph:
        check_graphable(found.cls, found.id)


def fused_counts() -> HeadCounts:
    """The kernel; Triton is imported here and nowhere else."""
    from clbench.evaluator.kernels import head_counts

    return head_counts


def fused_reader(store: ImageStore, views: Mapping[str, str], domains: Any) -> Reader:
    """A reader with the kernel."""
    from clbench.evaluator.images import FusedReader
    from clbench.evaluator.kernels import gather_images

    return FusedReader(store, views, domains, gather=gather_images)


def check_setting(found: registry.FoundMethod, scenario: Scenario) -> None:
    """Refuse a method in a setting it does not support."""
    if scenario.setting not in found.cls.settings:
        raise InputError(
            f"method {found.id} works in the {' and '.join(sorted(found.cls.settings))}-incremental setting, but "
            f"scenario {scenario.id} is {scenario.setting}-incremental; choose another scenario or method"
        )


def run_options(
    spec: RunSpec, recipe: registry.Recipe | None, scenario: Scenario, method: type[Method]
) -> dict[str, Choice]:
    """Views, sizes and mask, each with its source."""
    defaults = scenario.defaults
    given = {
        "train_view": (spec.train_view, defaults.train_view),
        "test_view": (spec.test_view, defaults.test_view),
        "batch_size": (spec.batch_size, defaults.batch_size),
        "epochs": (spec.epochs, defaults.epochs),
        "updates_per_batch": (spec.updates_per_batch, defaults.updates_per_batch),
        "eval_per_group": (spec.eval_per_group, defaults.eval_per_group),
        "mask": (spec.mask, None),
    }
    recipe_run = recipe.run if recipe else {}
    for key in recipe_run:
        if key not in given:
            raise unknown_name(f"key in [recipe.run] of {recipe.source if recipe else ''}", key, given)
    if scenario.online and spec.epochs not in (None, 1):
        raise InputError(f"scenario {scenario.id} is online: its samples come once; leave --epochs out")
    out = {}
    for key, (value, default) in given.items():
        if value is not None:
            out[key] = Choice(value, f"--{key.replace('_', '-')}")
        elif key in recipe_run:
            out[key] = Choice(recipe_run[key], f"recipe: {recipe.source if recipe else ''}")
        elif key == "mask":
            out[key] = Choice(method.mask, "method")
        else:
            out[key] = Choice(default, "scenario")
    return out


def backbone_choice(
    spec: RunSpec,
    recipe: registry.Recipe | None,
    store: ImageStore,
    found: registry.FoundMethod,
    family: str | None = None,
) -> tuple[Choice, Choice, str]:
    """Name and options of the backbone, and where its weights come from."""
    if spec.backbone is not None:
        name = Choice(spec.backbone, "--backbone")
        options = Choice(dict(spec.backbone_options), "--backbone-set")
    elif recipe is not None and recipe.backbone is not None:
        name = Choice(recipe.backbone, f"recipe: {recipe.source}")
        options = Choice({**(recipe.backbone_options or {}), **spec.backbone_options}, name.source)
    elif family is not None:
        name = Choice(FAMILIES[family].backbone, f"protocol family {family}")
        options = Choice(dict(spec.backbone_options), "--backbone-set")
    else:
        channels, height, width = store.image_shape
        small = channels == 1 and height * width <= 28 * 28
        frozen = found.cls.frozen_backbone is True
        default = ("flatten" if frozen else found.cls.small_backbone) if small else "reduced-resnet18"
        name = Choice(default, "default for images of this size")
        options = Choice(dict(spec.backbone_options), "--backbone-set")
    return name, options, "--weights" if spec.weights else "backbone"


def protocol_changes(
    preset: scenarios.Preset, options: Mapping[str, Choice], backbone: str, backbone_options: Mapping[str, Any]
) -> list[str]:
    """What a run has changed of its scenario's protocol family, by name: its numbers stand beside others only with that
    said. Hyperparameters are the recipe's affair, and who has set them is in the record anyway."""
    if preset.family is None:
        return []
    changed = [] if backbone == FAMILIES[preset.family].backbone and not backbone_options else ["backbone"]
    changed += [key for key, choice in options.items() if choice.source.startswith("--") and key != "eval_per_group"]
    return changed + sorted(preset.changed)


def choose_native_views(
    options: dict[str, Choice],
    name: str,
    weights: Path | None,
    backbone_options: Mapping[str, Any],
    for_texts: bool = False,
) -> None:
    """Replace the view `native` by the pipeline that the backbone's weights were published with, in place. A pretrained
    backbone of timm or open_clip takes it too where only the scenario, which knows nothing of the backbone, has named a
    view; one with prompts was made for a text encoder's images (`for_texts`)."""
    if name in EMBEDDED:
        native = None
        wanted = [key for key in VIEWS if options[key].value == "native"]
    else:
        pretrained = parse_option(backbone_options.get("pretrained", True)) is not False
        native = backbones.native_view(name, weights=weights, pretrained=pretrained)
        told = (weights is not None or pretrained) and not for_texts
        wanted = [k for k in VIEWS if options[k].value == "native" or (told and options[k].source == "scenario")]
    if wanted and native is None:
        flags = " and ".join(f"--{key.replace('_', '-')}" for key in wanted)
        raise InputError(
            f"which images backbone {name} expects is not known; give {flags}, for example "
            f'"resize(224,bicubic) normalize(imagenet)"'
        )
    for key in wanted:
        options[key] = Choice(native, f"native view of {name}")


def input_shape(store: ImageStore, test_view: str) -> tuple[int, int, int]:
    """(C, H, W) that the backbone gets."""
    channels, height, width = data.parse_view(test_view).output_shape(store.image_shape)
    return channels, height, width


def check_contamination(network: Backbone, store: ImageStore, name: str, allowed: bool) -> str | None:
    """Refuse a backbone that was pretrained on the scenario's images; --allow-contamination has it marked instead."""
    problem = backbones.guard(network.pretrained_on, store.images_of)
    if problem and not allowed:
        raise InputError(
            f"backbone {name} on {store.name}: {problem}; choose another, or mark the run by --allow-contamination"
        )
    return problem


def reference_of(
    found: registry.FoundMethod, config: Any, spec: RunSpec, store: ImageStore, view: str, size: int | None,
    network: Backbone,
) -> FoundReference | None:  # fmt: skip
    """The reference set that the method asks for."""
    wanted = found.cls.reference(config)
    if wanted is None:
        return None
    return find_reference(
        wanted, store, view=view, size=size, roots=spec.data, pretrained_on=network.pretrained_on,
        allowed=spec.allow_contamination,
    )  # fmt: skip


def make_method(
    cls: type[Method],
    config: Any,
    network: nn.Module,
    scenario: Scenario,
    stream: Stream,
    reference: Reference | None = None,
) -> Method:
    """Construct the method; its initial draws depend on the run's seed alone."""
    reader, device = stream.read, stream.device

    def rng(purpose: str, *keys: int | str) -> torch.Generator:
        return generator(stream.seed, f"method/{purpose}", *keys, device=device)

    setting = Setting(
        classes=scenario.classes,
        classes_per_task=tuple(len(task.classes) for task in scenario.tasks),
        task_classes=tuple(task.classes for task in scenario.tasks),
        image_shape=tuple(reader.output_shape("train")),
        image_bytes=reader.store.images[0].numel(),
        device=device,
        scenario_id=scenario.id,
        setting=scenario.setting,
        online=scenario.online,
        epochs=stream.epochs,
        batch_size=stream.batch_size,
        updates_per_batch=stream.updates,
        prompts=scenario.prompts,
        read=reader,
        rng=rng,
        reference=reference,
        stream_length=scenario.offsets[-1],
    )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(derive_seed(stream.seed, "init"))
        method = cls(config, network, setting)
        for module in method.modules():
            module.to(device)
    return method


def make_schedule(spec: RunSpec, scenario: Scenario, plans: list[list[Plan]], per_group: int) -> tuple[Schedule, str]:
    """`--eval-every`, else the scenario's own, else the densest at which evaluation costs no more than training."""
    if spec.eval_every is not None:
        return Schedule(spec.eval_every, 0), "--eval-every"
    defaults = scenario.defaults
    if defaults.eval_samples is not None:
        return Schedule(0, 0, defaults.eval_samples), "scenario"
    if defaults.eval_every is not None:
        return Schedule(defaults.eval_every, defaults.eval_dense if defaults.eval_every > 1 else 0), "scenario"
    steps = [sum(plan.steps for plan in task) for task in plans]
    images = [sum(plan.steps * min(plan.batch_size, len(plan.rows)) for plan in task) for task in plans]
    unlocked = [
        [g for g in scenario.groups if (g.task is None or g.task <= index)] for index in range(len(scenario.tasks))
    ]
    tested = [sum(min(len(g.rows), per_group) for g in groups) for groups in unlocked]
    return fit_schedule(steps, images, tested, defaults.eval_dense), "as dense as training's cost allows"


def plain(value: Any) -> Any:
    """JSON-able form of a scenario parameter."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
