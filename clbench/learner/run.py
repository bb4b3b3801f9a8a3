"""From a specification to a finished run record: resume what is unfinished, show what is done, lose nothing."""

import contextlib
import copy
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from clbench.backbones.features import FeatureBank
from clbench.errors import RunFailed
from clbench.learner.learner import Interrupted, Learner, Progress
from clbench.learner.resolve import Resolved
from clbench.methods.base import Method
from clbench.metrics import Curve, per_level, summarise
from clbench.scenarios.model import Scenario
from clbench.store.record import RunRecord, run_id

__all__ = [
    "RunResult",
    "attach_features",
    "make_learner",
    "process_state",
    "run",
    "run_folder",
    "start",
    "weights_digest",
]


@dataclass(frozen=True)
class RunResult:
    """Where a run's record lies and what it says. `status`: `done` now, or `found` (it had been done before)."""

    path: Path
    summary: dict[str, Any]
    status: str


def run_folder(resolved: Resolved) -> Path:
    """`<out>/<scenario>/<method>/<run_id>`."""
    scenario, method = resolved.scenario.id, resolved.found.id
    return resolved.spec.out / scenario / method / run_id(resolved.identity)


def run(resolved: Resolved, progress: Progress | None = None, *, fresh: bool = False) -> RunResult:
    """Run, or resume, or show. `fresh` starts anew beside an earlier record.

    Raises RunFailed (NaN loss, full disk, record in use) and KeyboardInterrupt (checkpoint saved).
    """
    with process_state(resolved.device, resolved.spec.threads) as stopped:
        running = start(resolved, stopped, progress, fresh=fresh)
        while True:
            try:
                next(running)
            except StopIteration as end:
                result: RunResult = end.value
                return result


def start(
    resolved: Resolved, stop: Callable[[], bool], progress: Progress | None = None, *, fresh: bool = False
) -> Generator[None, None, RunResult]:
    """One run that gives way behind every step, to be driven inside `process_state`; its value is the result.

    Raises as `run` does. Closing it unfinished frees its record; what the newest checkpoint holds is kept.
    """
    path = run_folder(resolved)
    if fresh:
        path = next_free(path)
    record = RunRecord(path)
    if record.is_done():
        return RunResult(path, record.read_summary(), "found")
    with record.lock():
        record.create(resolved.document)
        record.append_env(device=resolved.device)
        begin = time.perf_counter()
        if resolved.method.view == "features":
            attach_features(resolved, progress)
        with memory_sentence(resolved):
            resolved.method.prepare(
                None if progress is None else lambda done, of: progress.stage("preparing", done, of)
            )
        extracting = time.perf_counter() - begin
        learner = make_learner(resolved, save=record.save_checkpoint, progress=progress, stop=stop)
        saved = record.load_checkpoint()
        if saved is not None:
            learner.load_state_dict(saved)
        for text in learner.notes:
            record.note(text)
        try:
            with memory_sentence(resolved):
                yield from learner.steps()
        except Interrupted:
            raise KeyboardInterrupt from None
        learner.times["extract_s"] = learner.times.get("extract_s", 0.0) + extracting
        summary = write_record(resolved, record, learner)
        record.finish(keep_checkpoint=resolved.spec.keep_checkpoint)
    return RunResult(path, summary, "done")


@contextlib.contextmanager
def memory_sentence(resolved: Resolved) -> Iterator[None]:
    """Turn the device's or the host's out-of-memory error into a sentence that names what to lower."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; the CPU allocator raises a plain one
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        advice = resolved.method.memory_advice
        raise RunFailed(f"out of memory on {resolved.device}: lower {advice} ({error})") from error


@contextlib.contextmanager
def process_state(device: torch.device, threads: int | None) -> Iterator[Callable[[], bool]]:
    """What runs need of the whole process: exact arithmetic, threads, the global generators given back at the end.
    Gives a function that says whether somebody asked to stop."""
    if threads is not None:
        torch.set_num_threads(threads)
    with (
        exact_arithmetic(device),
        stop_signals() as stopped,
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        yield stopped


def make_learner(
    resolved: Resolved,
    *,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Learner:
    """The learner of a resolved run; checkpoints go to `save`."""
    spec = resolved.spec

    def autocast() -> contextlib.AbstractContextManager[Any]:
        if spec.precision == "bf16":
            return torch.autocast(resolved.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    kind: type[Learner] = resolved.method.learner or Learner
    learner = kind(
        resolved.scenario, resolved.stream, resolved.method, resolved.evaluator(), resolved.schedule,
        save=save,
        checkpoint_steps=spec.checkpoint_every,
        before_training=resolved.mask != "seen",
        autocast=autocast, progress=progress, stop=stop,
    )  # fmt: skip
    learner.cuda_graph = spec.cuda_graph
    learner.measure_chunk = spec.eval_batch == "measured"
    return learner


def attach_features(resolved: Resolved, progress: Progress | None) -> None:
    """Extract the frozen backbone's features of all rows of the scenario, once; later runs find them in the cache.

    Where the scenario changes pixels, a row looks different in every domain: features are then computed as they are
    asked for, not kept.
    """
    reader, store = resolved.reader, resolved.store
    if resolved.scenario.domains is not None:
        network = copy.deepcopy(resolved.backbone).eval()

        def live(rows: torch.Tensor, domain: torch.Tensor | None) -> torch.Tensor:
            with torch.no_grad():
                features: torch.Tensor = network(reader(rows, domain, "test"))
            return features

        reader.features = live
        return

    def read(rows: torch.Tensor) -> torch.Tensor:
        return reader(rows.to(resolved.device), None, "test")

    bank = FeatureBank(
        resolved.backbone, read, resolved.feature_rows(),
        key_parts={
            "view": resolved.identity["test_view"],
            "store": store.fingerprint,
        },
        device=resolved.device,
        precision=resolved.spec.precision,
    )  # fmt: skip
    bank.extract(None if progress is None else lambda done, total: progress.stage("extracting features", done, total))
    reader.features = bank


def write_record(resolved: Resolved, record: RunRecord, learner: Learner) -> dict[str, Any]:
    """Write curve, matrix, losses, predictions and summary; returns the summary."""
    scenario, evaluator = resolved.scenario, learner.evaluator
    sizes = np.array([len(group.rows) for group in scenario.groups])
    group_task = np.array([-1 if group.task is None else group.task for group in scenario.groups])
    names = [group.name for group in scenario.groups]
    drained = evaluator.drain()
    points = np.array(drained["points"], dtype=np.int64).reshape(-1, 4)
    curve = Curve.of(
        steps=points[:, 0], task=points[:, 1], phase=points[:, 2], position=points[:, 3], hits=drained["hits"],
        totals=drained["totals"], valid=drained["valid"], groups=names, group_task=group_task,
        task_ends=[*learner.task_starts[1:], learner.at.step],
    )  # fmt: skip
    rows = {after: hits.numpy() / np.maximum(sizes, 1) for after, hits in learner.matrix}
    matrix = np.stack([rows[index] for index in range(len(scenario.tasks))])
    active = np.zeros(matrix.shape, np.bool_)  # groups that had begun to count after each task
    for index in range(len(scenario.tasks)):
        active[index, list(evaluator.active_groups(index, scenario.offsets[index + 1]))] = True
    metrics = summarise(
        matrix, group_task=group_task, sizes=sizes, setting=scenario.setting, mask=resolved.mask, before=rows.get(-1),
        curve=curve, active=active, sample_period=scenario.defaults.eval_samples if scenario.online else None,
        own=own_samples(scenario), parts=(drained["parts"], drained["part_totals"]) if "parts" in drained else None,
    )  # fmt: skip
    levels = np.array([group.level for group in scenario.groups])
    phase_names = [[plan.phase.name for plan in plans] for plans in resolved.plans]
    record.write_curve(curve, phase_names)
    record.write_matrix(matrix, names, sizes=sizes, before=rows.get(-1))
    record.write_losses(*learner.losses.table(), learner.losses.names)
    targets = torch.cat([group.targets for group in scenario.groups]).numpy()
    test_rows = torch.cat([group.rows for group in scenario.groups]).numpy()
    record.write_predictions(test_rows, targets, torch.stack(learner.predictions).numpy())
    if resolved.spec.keep_weights:
        record.write_weights(weights_of(resolved.method))
    parameters = {id(p): p.numel() for module in resolved.method.modules() for p in module.parameters()}
    summary = {
        **metrics,
        "steps": learner.at.step,
        "images_trained": learner.images_trained,
        "times": {key: round(value, 4) for key, value in learner.times.items()},
        "num_parameters": sum(parameters.values()),
        "memory_bytes": resolved.method.memory_bytes(),
        "memory_per_task": learner.memory,
        "levels": per_level(levels, matrix, curve, active, sizes, scenario.defaults.eval_samples),
        "peak_memory_bytes": peak_memory(resolved.device),
        "forward_flops_per_image": forward_flops(resolved),
        "evaluations": len(points),
        "eval_batch": evaluator.chunk,
        "weights_sha256": weights_digest(resolved.method),
    }
    record.write_summary(summary)
    return summary


def own_samples(scenario: Scenario) -> list[np.ndarray] | None:
    """Per task, (n,) bool: samples of the new task, not rehearsed ones. None unless an online stream has one test group
    per task."""
    if not scenario.online or [group.task for group in scenario.groups] != list(range(len(scenario.tasks))):
        return None
    out = []
    for task, group in zip(scenario.tasks, scenario.groups, strict=True):
        if scenario.setting != "domain":
            own = torch.isin(task.targets, task.classes)
        elif task.domain is not None and group.domain is not None and len(group.domain):
            own = task.domain == group.domain[0]
        else:
            own = torch.ones_like(task.rows, dtype=torch.bool)
        out.append(own.numpy())
    return out


def weights_of(method: Method) -> dict[str, torch.Tensor]:
    """Deployed weights: the parameters and buffers of the method's modules as `attribute.name`, and the tensors it
    keeps itself (prototypes, statistics) as `attribute`. Contiguous CPU tensors."""
    found: dict[str, torch.Tensor] = {}
    with method.deployed():
        for attribute, value in vars(method).items():
            if isinstance(value, nn.Module):
                found |= {f"{attribute}.{key}": tensor for key, tensor in value.state_dict().items()}
            elif isinstance(value, torch.Tensor) and not attribute.startswith("_"):
                found[attribute] = value
        return {name: value.detach().cpu().contiguous().clone() for name, value in found.items()}


def weights_digest(method: Method) -> str:
    """sha256 over the deployed weights, to compare runs bit by bit."""
    digest = sha256()
    for name, value in sorted(weights_of(method).items()):
        digest.update(name.encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def peak_memory(device: torch.device) -> int:
    """Largest memory of this process, bytes: on the GPU if it ran there, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def forward_flops(resolved: Resolved) -> int:
    """Floating-point operations (2 per multiply-add) of the backbone on one image."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = resolved.reader.output_shape("test")
    network = resolved.backbone
    mode = network.training
    counter = FlopCounterMode(display=False)
    as_written = torch.compiler.set_stance("force_eager") if resolved.spec.compile else contextlib.nullcontext()
    with counter, torch.no_grad(), as_written:
        network.eval()(torch.zeros((1, *shape), device=resolved.device))
    network.train(mode)
    return int(counter.get_total_flops())


@contextlib.contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Full fp32 and deterministic kernels on a GPU, so that a resumed run is the same to the bit. All flags are given
    back; the environment variable, which cuBLAS reads once, stays."""
    if device.type != "cuda":
        yield
        return
    # cuBLAS asks for it where steps and evaluations run on several streams; read when it is first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags: tuple[tuple[Any, str], ...] = (
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_tf32"),
        (torch.backends.cudnn, "benchmark"),
        (torch.utils.deterministic, "fill_uninitialized_memory"),  # a help in debugging that costs a write
    )
    before = [getattr(place, name) for place, name in flags]
    torch.use_deterministic_algorithms(True, warn_only=True)
    for place, name in flags:
        setattr(place, name, False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])
        for (place, name), value in zip(flags, before, strict=True):
            setattr(place, name, value)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a polite stop behind the current step; a second one acts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def next_free(path: Path) -> Path:
    """`path`, or `path-2`, `path-3` ...: the first that does not exist."""
    if not path.exists():
        return path
    number = 2
    while path.with_name(f"{path.name}-{number}").exists():
        number += 1
    return path.with_name(f"{path.name}-{number}")
