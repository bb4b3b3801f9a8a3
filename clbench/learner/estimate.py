"""What a run will cost, for `--dry-run`: a few of its steps are taken for real, and the rest is counted."""

import contextlib
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clbench.evaluator.evaluator import watching
from clbench.learner.learner import Interrupted
from clbench.learner.resolve import Resolved
from clbench.learner.run import make_learner, peak_memory
from clbench.stream import Plan

__all__ = ["Estimate", "estimate"]

TRIAL_SECONDS = 3.0
TRIAL_IMAGES = 64
WARM_UP = 3  # first steps, slower than the others
CHEAP_STEP_SECONDS = 0.002  # a step without images: cached features, Gaussian draws
CURVE_ROW, LOSS_ROW, PREDICTION_ROW = 24, 20, 14  # bytes before compression, see `clbench.store.schema`


@dataclass(frozen=True)
class Estimate:
    """Seconds and bytes of a whole run on this machine, extrapolated from its first `trial_steps` steps.

    extract_s: for the features of a frozen backbone, as if none were in the cache. disk_bytes: record, checkpoints and
    features, at most.
    """

    num_steps: int
    num_evaluations: int
    extract_s: float
    train_s: float
    evaluate_s: float
    memory_bytes: int
    disk_bytes: int
    num_parameters: int
    trial_steps: int

    @property
    def total_s(self) -> float:
        return self.extract_s + self.train_s + self.evaluate_s


def estimate(resolved: Resolved, seconds: float = TRIAL_SECONDS) -> Estimate:
    """Train for about `seconds` and count the rest; writes nothing. `resolved` is used up: resolve anew to run it."""
    scenario, plans, method = resolved.scenario, resolved.plans, resolved.method
    extract_s, feature_bytes = 0.0, 0
    if method.view == "features":
        rows, width = resolved.feature_rows(), int(str(resolved.backbone.num_features))
        extract_s = len(rows) * seconds_per_image(resolved, resolved.backbone)
        feature_bytes = len(rows) * width * 4
        resolved.reader.features = random_features(width)  # of the right shape: what they say costs nothing
    num_steps, step_s, state_bytes, num_losses = trial(resolved, seconds)

    tried = plans[0][0]
    train_s = 0.0
    for plan in (plan for task in plans for plan in task):
        alike = uses_images(plan) == uses_images(tried)
        train_s += plan.steps * (step_s * plan.batch_size / tried.batch_size if alike else CHEAP_STEP_SECONDS)

    sizes = [len(group.rows) for group in scenario.groups]
    evaluations, images = 0, len(plans) * sum(sizes)
    for index, task in enumerate(plans):
        count = resolved.schedule.count(sum(plan.steps for plan in task), len(scenario.tasks[index].rows))
        tested = [len(group.rows) for group in scenario.groups if group.task is None or group.task <= index]
        evaluations += count
        images += count * sum(min(n, resolved.per_group) for n in tested)
    evaluate_s = images * seconds_per_image(resolved, answer_of(resolved), method.view)

    steps = sum(plan.steps for task in plans for plan in task)
    record = (
        evaluations * len(sizes) * CURVE_ROW + steps * num_losses * LOSS_ROW + len(plans) * sum(sizes) * PREDICTION_ROW
    )
    parameters = {id(p): p.numel() for module in method.modules() for p in module.parameters()}
    return Estimate(
        num_steps=steps,
        num_evaluations=evaluations,
        extract_s=extract_s,
        train_s=train_s,
        evaluate_s=evaluate_s,
        memory_bytes=peak_memory(resolved.device) + feature_bytes,
        disk_bytes=record + 2 * state_bytes + feature_bytes,
        num_parameters=sum(parameters.values()),
        trial_steps=num_steps,
    )


def trial(resolved: Resolved, seconds: float) -> tuple[int, float, int, int]:
    """Run the real learner until the time is up.

    Returns steps taken, seconds per step, bytes of a checkpoint, losses per step.
    """
    sizes = [0]

    def measure(state: dict[str, Any]) -> None:
        file = io.BytesIO()
        torch.save(state, file)
        sizes.append(file.getbuffer().nbytes)

    marks: list[tuple[int, float, float]] = []  # after each step: steps, seconds spent on them, clock

    def stop() -> bool:  # timed from the first step: before it all test images may have been evaluated
        marks.append((learner.at.step, learner.times["data_s"] + learner.times["train_s"], time.monotonic()))
        return marks[-1][2] - marks[0][2] > seconds

    learner = make_learner(resolved, save=measure, stop=stop)
    with contextlib.suppress(Interrupted):
        learner.run()
    first, last = marks[min(WARM_UP, len(marks) - 1)], marks[-1]
    if first == last:
        first = (0, 0.0, 0.0)
    return last[0], (last[1] - first[1]) / (last[0] - first[0]), max(sizes), len(learner.losses.names)


def uses_images(plan: Plan) -> bool:
    return plan.phase.source != "none" and plan.phase.view != "features"


def random_features(width: int) -> Callable[[Tensor, Tensor | None], Tensor]:
    def read(rows: Tensor, domain: Tensor | None) -> Tensor:
        rng = torch.Generator(rows.device).manual_seed(0)
        return torch.randn((len(rows), width), generator=rng, device=rows.device)

    return read


def answer_of(resolved: Resolved) -> Callable[[Tensor], Tensor]:
    """What the evaluator asks of the method for a chunk of images."""
    allowed = torch.ones(resolved.scenario.num_classes, dtype=torch.bool, device=resolved.device)
    task = 0 if resolved.scenario.setting == "task" else None
    return lambda images: resolved.method.logits(images, allowed, task)


def seconds_per_image(resolved: Resolved, network: Callable[[Tensor], Tensor], view: str = "test") -> float:
    """Of reading and one forward pass, in a batch of a few images, after one pass to warm up."""
    rows = resolved.scenario.groups[0].rows[:TRIAL_IMAGES].to(resolved.device)
    begin = 0.0
    with watching(resolved.method):
        for _ in range(2):
            if resolved.device.type == "cuda":
                torch.cuda.synchronize(resolved.device)
            begin = time.perf_counter()
            network(resolved.reader(rows, None, view))
    if resolved.device.type == "cuda":
        torch.cuda.synchronize(resolved.device)
    return (time.perf_counter() - begin) / len(rows)
