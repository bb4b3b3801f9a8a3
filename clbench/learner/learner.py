"""The training loop: runs the phases a method asks for, evaluates, keeps the books, and can be killed at any moment.

State is the cursor plus what method, evaluator and books give: `state_dict` after any step, `load_state_dict` in a
fresh process, and the rest of the run is the same to the bit.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from clbench.evaluator import Evaluator, Schedule
from clbench.learner.graphed_step import GraphedStep
from clbench.learner.losses import LossLog
from clbench.methods.base import Method
from clbench.rng import derive_seed
from clbench.scenarios.model import Scenario
from clbench.stream import Cursor, Plan, Stream

__all__ = ["Interrupted", "Learner", "Progress"]

DRAIN_STEPS = 256  # at most so many steps of losses wait on the device, so a NaN is noticed soon
SHOW_SECONDS = 0.5


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint is saved."""


class Progress(Protocol):
    """What the learner tells while it works. All calls are cheap and rare (about twice a second)."""

    def begin(self, done: int, total: int) -> None: ...
    def update(self, done: int, *, task: int, num_tasks: int, phase: str, accuracy: float | None) -> None: ...
    def stage(self, name: str, done: int, total: int) -> None: ...


class Learner:
    """Drives one method through one scenario.

    save: called with a state dict when a checkpoint is due; checkpoint_steps: every so many steps, else every
    checkpoint_seconds. stop: asked after each step, True saves and raises Interrupted.
    before_training: also evaluate all groups before the first step (forward transfer needs it).
    """

    def __init__(
        self,
        scenario: Scenario,
        stream: Stream,
        method: Method,
        evaluator: Evaluator,
        schedule: Schedule,
        *,
        save: Callable[[dict[str, Any]], None] = lambda state: None,
        checkpoint_steps: int | None = None,
        checkpoint_seconds: float = 60.0,
        before_training: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        progress: Progress | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.scenario = scenario
        self.stream = stream
        self.method = method
        self.evaluator = evaluator
        self.schedule = schedule
        self.losses = LossLog()
        self.at = Cursor(0, 0, 0, 0, 0)
        self.task_starts: list[int] = []  # step at which each task began
        self.matrix: list[tuple[int, Tensor]] = []  # (task it follows, -1 before training; hits (G,))
        self.predictions: list[Tensor] = []  # after each task: (all test rows,) int32
        self.memory: list[dict[str, int]] = []  # after each task: what the method keeps, bytes by name
        self.sampled = 0  # evaluations that were due by samples
        self.times = {"data_s": 0.0, "train_s": 0.0, "evaluate_s": 0.0, "save_s": 0.0}
        self.notes: list[str] = []  # what the record should say of this start
        self.images_trained = 0
        self.guard: Callable[[], AbstractContextManager[None]] = nullcontext  # tests put `forbid_host_reads` here
        self.cuda_graph = False  # steps as CUDA graphs (`clbench.learner.graphed_step`)
        self.measure_chunk = False  # choose the evaluator's rows of one forward pass by time, ahead of the first step
        self._save = save
        self._checkpoint_steps = checkpoint_steps
        self._checkpoint_seconds = checkpoint_seconds
        self._before_training = before_training
        self._autocast = autocast
        self._progress = progress
        self._stop = stop
        self._inside = False  # inside a phase: begin_phase has been called
        self._restored: Mapping[str, Any] | None = None
        self._saved_at = (0, time.monotonic())
        self._shown_at = 0.0

    # -- the loop ------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Run to the end from wherever the cursor is. Raises RunFailed (NaN loss) or Interrupted."""
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[None]:
        """`run` that gives way behind every step: learners can take turns, for nothing of theirs is global between two
        steps (`clbench.learner.side_by_side`)."""
        if self._progress is not None:
            self._progress.begin(self.at.step, self.total_steps())
        if self._restored is not None and not self._inside:
            self.method.load_state_dict(self._restored)
            self._restored = None
        while self.at.task < len(self.scenario.tasks):
            yield from self._run_task()
        self.losses.drain()

    def total_steps(self) -> int:
        """Steps of the whole run, if no phase ends early."""
        return sum(plan.steps for plans in self.plans() for plan in plans)

    def plans(self) -> list[list[Plan]]:
        """The phases of every task laid out."""
        return [
            [self.stream.plan(index, phase, number) for number, phase in enumerate(self.method.phases(task, index))]
            for index, task in enumerate(self.scenario.tasks)
        ]

    def _run_task(self) -> Iterator[None]:
        index = self.at.task
        task = self.scenario.tasks[index]
        phases = self.method.phases(task, index)
        if len(self.task_starts) == index:
            self.task_starts.append(self.at.step)
        while self.at.phase < len(phases):
            phase = phases[self.at.phase]
            plan = self.stream.plan(index, phase, self.at.phase)
            if not self._inside:
                self._seed_global("begin")
                self.method.begin_phase(task, phase, self.at)
                self._inside = True
            self.method.open_phase(task, phase, self.at)
            if self._restored is not None:
                self.method.load_state_dict(self._restored)
                self._restored = None
            self.evaluator.phase_changed()
            if self.at.step == 0:
                self._observe_start(plan)
            yield from self._run_phase(plan)
            self._seed_global("end")
            self.method.end_phase(task, phase, self.at)
            self.evaluator.phase_changed()
            self.at = self.at._replace(phase=self.at.phase + 1, iteration=0, update=0)
            self._inside = False
        self._finish_task()
        self.at = self.at._replace(task=index + 1, phase=0)
        self.checkpoint()

    def _run_phase(self, plan: Plan) -> Iterator[None]:
        method, stream, evaluator, times = self.method, self.stream, self.evaluator, self.times
        task_start = self.task_starts[self.at.task]
        take_step = GraphedStep(method, stream.device) if self.cuda_graph else method.step
        clock = time.perf_counter
        while self.at.iteration < plan.iterations:
            at = self.at
            begin = clock()
            batch = stream.batch(plan, at)
            got = clock()
            self._seed_global("step")
            with self._autocast(), self.guard():
                losses = take_step(batch)
            step = at.step + 1
            self.losses.add(step, losses)
            self.images_trained += len(batch.rows)
            trained = clock()
            if batch.last_update:
                self.at = at._replace(iteration=at.iteration + 1, update=0, step=step)
            else:
                self.at = at._replace(update=at.update + 1, step=step)
            position = stream.position(plan, at.iteration)
            by_samples = batch.last_update and self.schedule.due_by_samples(position, self.sampled)
            if by_samples or self.schedule.due(step - task_start):
                self.sampled += by_samples
                with self._autocast(), self.guard():
                    evaluator.observe(method, at.task, at.phase, step, position)
            times["data_s"] += got - begin
            times["train_s"] += trained - got
            times["evaluate_s"] += clock() - trained
            if batch.last_update and plan.per_epoch and self.at.iteration % plan.per_epoch == 0:
                task = self.scenario.tasks[at.task]
                if method.end_epoch(task, plan.phase, self.at):
                    self.at = self.at._replace(iteration=plan.iterations)
            self._housekeeping(plan)
            yield

    def _observe_start(self, plan: Plan) -> None:
        begin = time.perf_counter()
        if self.measure_chunk and not self.evaluator.points:
            with self._autocast():
                self.evaluator.measure_chunk(self.method)
        if self.schedule.on and not self.evaluator.points:
            with self._autocast():
                self.evaluator.observe(self.method, 0, 0, 0, self.stream.position(plan, 0))
        if self._before_training and not self.matrix:
            self._evaluate_fully(-1)
        self.times["evaluate_s"] += time.perf_counter() - begin

    def _finish_task(self) -> None:
        begin = time.perf_counter()
        index, step = self.at.task, self.at.step
        observed = self.evaluator.points[-1][0] if self.evaluator.points else -1
        end = self.scenario.offsets[index + 1]
        if self.schedule.on and observed != step:
            last_phase = max(self.at.phase - 1, 0)
            with self._autocast():
                self.evaluator.observe(self.method, index, last_phase, step, end)
        self._evaluate_fully(index)
        self.times["evaluate_s"] += time.perf_counter() - begin

    def _evaluate_fully(self, index: int) -> None:
        def show(done: int, total: int) -> None:
            if self._progress is not None:
                self._progress.stage("testing", done, total)

        position = self.scenario.offsets[max(index, 0) + 1]
        with self._autocast():
            result = self.evaluator.full(self.method, position, show)
        self.matrix.append((index, result.hits.cpu()))
        if index >= 0:
            self.predictions.append(result.predictions.cpu())
            self.memory.append(self.method.memory_bytes())

    # -- books ---------------------------------------------------------------------------------------------------
    def _housekeeping(self, plan: Plan) -> None:
        if len(self.losses) >= DRAIN_STEPS:
            self.losses.drain()
        now = time.monotonic()
        if self._stop():
            self.checkpoint()
            raise Interrupted
        if self._checkpoint_steps is not None:
            if self.at.step - self._saved_at[0] >= self._checkpoint_steps:
                self.checkpoint()
        elif now - self._saved_at[1] >= self._checkpoint_seconds:
            self.checkpoint()
        if self._progress is not None and now - self._shown_at >= SHOW_SECONDS:
            self._shown_at = now
            self._progress.update(
                self.at.step,
                task=self.at.task,
                num_tasks=len(self.scenario.tasks),
                phase=plan.phase.name,
                accuracy=self.current_accuracy(),
            )

    def current_accuracy(self) -> float | None:
        """Mean accuracy over the groups of the latest observation, from their subsets."""
        if not self.evaluator.points:
            return None
        latest = self.evaluator.drain(len(self.evaluator.points) - 1)
        valid = latest["valid"][0]
        if not valid.any():
            return None
        return float((latest["hits"][0] / latest["totals"].clamp(min=1))[valid].mean())

    def checkpoint(self) -> None:
        """Hand a state dict to `save`; a NaN loss is found first, so it never gets into a checkpoint."""
        begin = time.perf_counter()
        self.losses.drain()
        self._save(self.state_dict())
        self._saved_at = (self.at.step, time.monotonic())
        self.times["save_s"] += time.perf_counter() - begin

    def state_dict(self) -> dict[str, Any]:
        return {
            "cursor": list(self.at),
            "inside": self._inside,
            "method": self.method.state_dict(),
            "evaluator": self.evaluator.state_dict(),
            "losses": self.losses.state_dict(),
            "task_starts": list(self.task_starts),
            "matrix": [[after, hits] for after, hits in self.matrix],
            "predictions": list(self.predictions),
            "memory": list(self.memory),
            "sampled": self.sampled,
            "times": dict(self.times),
            "images_trained": self.images_trained,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state; the method's part is put back when its phase is open (see `Method.open_phase`)."""
        self.at = Cursor(*state["cursor"])
        self._inside = state["inside"]
        self._restored = state["method"]
        self.evaluator.load_state_dict(state["evaluator"])
        self.losses.load_state_dict(state["losses"])
        self.task_starts = list(state["task_starts"])
        self.matrix = [(after, hits) for after, hits in state["matrix"]]
        self.predictions = list(state["predictions"])
        self.memory = list(state["memory"])
        self.sampled = state["sampled"]
        self.times = dict(state["times"])
        self.images_trained = state["images_trained"]
        self._saved_at = (self.at.step, time.monotonic())

    def _seed_global(self, moment: str) -> None:
        # dropout and methods that draw from the global generator become functions of the cursor too
        seed = derive_seed(self.stream.seed, moment, self.at.task, self.at.phase, self.at.step)
        torch.default_generator.manual_seed(seed)
        if self.stream.device.type == "cuda":
            torch.cuda.manual_seed(seed)
