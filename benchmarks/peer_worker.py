"""One peer in a process of its own, answering `peers.py`: times of ER steps, batches, evaluations, end to end.

python benchmarks/peer_worker.py clbench|floor|avalanche|avalanche-pil|mammoth '{"device": "cpu", ...}'

Each line on stdin is {"case": ..., "steps": n}; each answer is {"cpu_ms", "wall_ms"} per step, or {"missing": why}. All
peers have the same images, model, batch sizes and evaluation, and full memories; on a GPU none has TF32. Avalanche
evaluates with per-task and stream accuracy; it is fed from memory (`clbench.interop`, its fast case) or with PIL images
as torchvision does (`avalanche-pil`), and runs in whichever interpreter has it.
"""

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any, TextIO

import torch
from floor import FloorER, floor_evaluate
from parts import Free, cifar_shaped
from torch import nn

from clbench.backbones import build as build_backbone
from clbench.data.reader import Reader
from clbench.evaluator import Schedule
from clbench.evaluator.chunks import fitting_chunk
from clbench.evaluator.parts import PartsEvaluator
from clbench.learner.learner import Learner
from clbench.learner.resolve import make_method
from clbench.learner.run import exact_arithmetic
from clbench.methods.er import ER
from clbench.rng import generator
from clbench.scenarios.class_incremental import Params, build
from clbench.scenarios.model import StreamDefaults
from clbench.stream import Cursor, Plan, Stream

BATCH, CAPACITY, TASKS, CLASSES, LR = 10, 500, 5, 10, 0.01


class Peer:
    """What all have in common. `cases`: name -> function of a number of steps. resident: images lie on the device,
    instead of in the host's memory."""

    resident = True

    def __init__(self, device: str, width: int, eval_images: int, stream_per_class: int) -> None:
        self.device, self.width = torch.device(device), width
        store = cifar_shaped(CLASSES, stream_per_class, eval_images // CLASSES)
        self.store = store.to(self.device) if self.resident else store
        defaults = StreamDefaults(batch_size=BATCH, drop_last=True)
        self.scenario = build([self.store.table()], 0, Params(tasks=TASKS, online=True), defaults=defaults)
        self.per_group = eval_images // TASKS
        self.cases: dict[str, Callable[[int], None]] = {}

    def backbone(self, free: bool) -> nn.Module:
        if free:
            return Free(3072)
        torch.manual_seed(0)
        network = build_backbone("reduced-resnet18", in_shape=(3, 32, 32), seed=0, options={"nf": self.width})
        return network.to(self.device, memory_format=torch.channels_last)

    def model(self, free: bool) -> nn.Module:
        network = self.backbone(free)
        return nn.Sequential(network, nn.Linear(network.num_features, CLASSES)).to(self.device)


class Clbench(Peer):
    """The learner's own loop on the last task, so that all groups count. On a GPU with `--cuda-graph` and
    `--evaluator graph`, and the deterministic algorithms of every run."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.graphs = self.device.type == "cuda"
        self.loops: dict[Learner, Iterator[None]] = {}
        free, watched = self.learner(True, 0), self.learner(False, 1)
        self.cases = {
            "step": lambda steps: self.run(free, steps),
            "load": lambda steps: self.load(free, steps),
            "evaluation": lambda steps: self.evaluate(free, steps),
            "end to end": lambda steps: self.run(watched, steps),
        }

    def learner(self, free: bool, every: int) -> Learner:
        reader = Reader(self.store, {"train": "", "test": ""})
        stream = Stream(self.scenario, reader, seed=0, device=self.device)
        config = ER.Config(capacity=CAPACITY, replay_batch_size=BATCH, lr=LR)
        method = make_method(ER, config, self.backbone(free), self.scenario, stream)
        evaluator = PartsEvaluator(
            self.scenario, reader, view="test", mask="all", per_group=self.per_group, slots=100_000, seed=0,
            device=self.device, engine="graph" if self.graphs else "plain",
        )  # fmt: skip
        learner = Learner(self.scenario, stream, method, evaluator, Schedule(every))
        learner.cuda_graph = self.graphs
        learner.task_starts += [0] * TASKS
        plan = learner.plans()[-1][0]
        method.open_phase(self.scenario.tasks[-1], plan.phase, learner.at)
        for start in range(0, CAPACITY, BATCH):
            cut = slice(start % len(plan.rows), start % len(plan.rows) + BATCH)
            draws = generator(0, "fill", start, device=self.device)
            method.buffer.add(plan.rows[cut], plan.targets[cut], draws)
        return learner

    def run(self, learner: Learner, steps: int) -> None:
        if learner not in self.loops:
            learner.at = Cursor(TASKS - 1, 0, 0, 0, 0)
            self.loops[learner] = learner._run_phase(longer(learner.plans()[-1][0]))
        taken = sum(1 for _ in islice(self.loops[learner], steps))
        assert taken == steps, "the stream is too short for so many rounds"

    def load(self, learner: Learner, steps: int) -> None:
        plan, stream, buffer = learner.plans()[-1][0], learner.stream, learner.method.buffer
        for step in range(steps):
            batch = stream.batch(plan, Cursor(TASKS - 1, 0, step % plan.iterations, 0, step))
            drawn = buffer.sample(BATCH, generator(0, "replay", step, device=self.device))
            stream.read(drawn.rows, None, "train")
            buffer.add(batch.rows, batch.targets, generator(0, "reservoir", step, device=self.device))

    def evaluate(self, learner: Learner, steps: int) -> None:
        learner.evaluator.points.clear(), learner.evaluator.active.clear()
        for step in range(steps):
            learner.evaluator.observe(learner.method, TASKS - 1, 0, step, 10**9)


def longer(plan: Plan, times: int = 1000) -> Plan:
    """The same rows over and over in one pass, so that one phase lasts for all rounds, as a run's would."""
    return plan._replace(
        rows=plan.rows.repeat(times), targets=plan.targets.repeat(times), per_epoch=plan.per_epoch * times,
        iterations=plan.iterations * times,
    )  # fmt: skip


class Floor(Peer):
    """Bare PyTorch on normalised float images in memory."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        task = self.scenario.tasks[-1]
        images = self.store.images[task.rows.to(self.device)].float() / 255
        targets = task.targets.to(self.device)
        self.batches = len(targets) // BATCH
        groups = self.scenario.groups
        rows = torch.cat([group.rows for group in groups]).to(self.device)
        self.test = self.store.images[rows].float() / 255, torch.cat([g.targets for g in groups]).to(self.device)
        self.group = torch.cat([torch.full((len(g.rows),), index) for index, g in enumerate(groups)]).to(self.device)
        self.hits = torch.zeros(TASKS, dtype=torch.int64, device=self.device)
        # rows of one forward pass as clbench has them, so that a ratio is of what is done around it
        self.chunk = fitting_chunk(Reader(self.store, {"test": ""}), "test", self.device)
        free, real = (
            FloorER(images, targets, self.model(kind), lr=LR, capacity=CAPACITY, batch=BATCH) for kind in (True, False)
        )
        self.count = 0
        self.run(free.draw, CAPACITY // BATCH), self.run(real.draw, CAPACITY // BATCH)
        self.cases = {
            "step": lambda steps: self.run(free.step, steps),
            "load": lambda steps: self.run(free.draw, steps),
            "evaluation": lambda steps: self.run(lambda start: self.evaluate(free.model), steps),
            "end to end": lambda steps: self.run(lambda start: self.watched(real, start), steps),
        }

    def run(self, work: Callable[[int], Any], steps: int) -> None:
        for _ in range(steps):
            work(self.count % self.batches * BATCH)
            self.count += 1

    def evaluate(self, model: nn.Module) -> None:
        floor_evaluate(model, *self.test, self.group, self.hits, self.chunk)

    def watched(self, er: FloorER, start: int) -> None:
        er.step(start)
        self.evaluate(er.model)


class Avalanche(Peer):
    """Avalanche's online stream with a reservoir (one experience per batch), which is ER as the literature means it,
    and besides its `Replay` strategy on whole tasks."""

    resident = False  # it takes samples one by one, and moves batches to the device

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        from avalanche.benchmarks.scenarios.online import split_online_stream
        from avalanche.evaluation.metrics import accuracy_metrics
        from avalanche.training import Naive, Replay
        from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin

        self.benchmark = self.fed()
        self.task = self.benchmark.train_stream[-1]
        self.pieces = split_online_stream([self.task], BATCH, shuffle=False, drop_last=True)
        self.loader = self.pieces_forever()

        def common(free: bool) -> dict[str, Any]:
            model = self.model(free)
            return {
                "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=LR), "train_mb_size": BATCH,
                "criterion": nn.CrossEntropyLoss(), "eval_mb_size": self.per_group, "device": self.device,
                "evaluator": EvaluationPlugin(accuracy_metrics(experience=True, stream=True)),
            }  # fmt: skip

        def online(free: bool) -> Any:
            memory = ReplayPlugin(CAPACITY, batch_size_mem=BATCH, storage_policy=self.full())
            return Naive(**common(free), plugins=[memory])

        free, real, whole = online(True), online(False), Replay(**common(True), mem_size=CAPACITY)
        whole.train(self.experience(CAPACITY // BATCH), eval_streams=[], pin_memory=False)  # fills its memory
        self.memory = self.full()
        self.cases = {
            "step": lambda steps: self.online(free, steps, False),
            "step, whole tasks": lambda steps: whole.train(self.experience(steps), eval_streams=[], pin_memory=False),
            "load": self.load,
            "evaluation": lambda steps: [free.eval(self.benchmark.test_stream, pin_memory=False) for _ in range(steps)],
            "end to end": lambda steps: self.online(real, steps, True),
        }

    def fed(self) -> Any:
        """The benchmark: uint8 images in memory, turned into floats one by one."""
        from clbench.interop.avalanche import to_avalanche

        return to_avalanche(self.scenario, self.store, rows_in_minibatch=False)

    def full(self) -> Any:
        """A reservoir with CAPACITY samples."""
        from avalanche.training.storage_policy import ReservoirSamplingBuffer

        memory = ReservoirSamplingBuffer(CAPACITY)
        for _ in range(CAPACITY // BATCH):
            memory.update_from_dataset(next(self.loader).dataset)
        return memory

    def pieces_forever(self) -> Any:
        while True:
            yield from self.pieces

    def experience(self, steps: int) -> Any:
        from avalanche.benchmarks import DatasetExperience

        length = len(self.task.dataset)
        return DatasetExperience(dataset=self.task.dataset.subset([n % length for n in range(steps * BATCH)]))

    def online(self, strategy: Any, steps: int, watch: bool) -> None:
        for _ in range(steps):
            strategy.train(next(self.loader), eval_streams=[], pin_memory=False)
            if watch:
                strategy.eval(self.benchmark.test_stream, pin_memory=False)

    def load(self, steps: int) -> None:
        from avalanche.benchmarks.utils.data_loader import ReplayDataLoader

        for _ in range(steps):
            new = next(self.loader).dataset
            if len(self.memory.buffer):
                for batch in ReplayDataLoader(
                    new.train(), self.memory.buffer, oversample_small_tasks=True, batch_size=BATCH,
                    batch_size_mem=BATCH, shuffle=True,
                ):  # fmt: skip
                    for part in batch:
                        part.to(self.device)
            self.memory.update_from_dataset(new)


class AvalanchePil(Avalanche):
    """The same fed as torchvision's data sets feed it: a PIL image per sample, ToTensor and Normalize."""

    def fed(self) -> Any:
        from avalanche.benchmarks import CLScenario, DatasetExperience, EagerCLStream
        from avalanche.benchmarks.scenarios.supervised import with_classes_timeline
        from torchvision.transforms import Compose, Normalize, ToTensor
        from torchvision.transforms.functional import to_pil_image

        from clbench.interop.avalanche import avalanche_dataset
        from clbench.interop.rows import RowDataset

        class Pictures(RowDataset):
            def __getitem__(self, index: int) -> Any:
                image, target = super().__getitem__(index)
                return to_pil_image(image), target

        transform: Any = Compose([ToTensor(), Normalize((0.5,) * 3, (0.25,) * 3)])

        def stream(name: str, group: str, parts: Any) -> Any:
            made = [Pictures(self.store, part.rows, part.targets) for part in parts]
            views = {"train": transform, "eval": transform}
            return EagerCLStream(
                name, [DatasetExperience(dataset=avalanche_dataset(part, 0, views, group, False)) for part in made]
            )

        streams = [stream("train", "train", self.scenario.tasks), stream("test", "eval", self.scenario.groups)]
        return with_classes_timeline(CLScenario(streams))


PEERS: dict[str, type[Peer]] = {
    "clbench": Clbench, "floor": Floor, "avalanche": Avalanche, "avalanche-pil": AvalanchePil,
}  # fmt: skip


def answer(peer: Peer, case: str, steps: int) -> dict[str, Any]:
    if case not in peer.cases:
        return {"missing": f"no {case}"}
    gc.collect()
    gc.disable()
    wait(peer.device)
    cpu, wall = time.process_time(), time.perf_counter()
    peer.cases[case](steps)
    wait(peer.device)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    gc.enable()
    return {"cpu_ms": cpu * 1e3 / steps, "wall_ms": wall * 1e3 / steps}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    warnings.simplefilter("ignore")
    warnings.showwarning = lambda *_, **__: None  # Avalanche shows its own deprecations whatever the filters say
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a peer prints goes elsewhere
    name, options = sys.argv[1], json.loads(sys.argv[2])
    torch.backends.cudnn.allow_tf32 = False
    with exact_arithmetic(torch.device(options["device"])) if name == "clbench" else nullcontext():
        serve(name, options, out)


def serve(name: str, options: dict[str, Any], out: TextIO) -> None:
    try:
        if name == "mammoth":
            from peer_mammoth import Mammoth

            PEERS[name] = Mammoth
        peer = PEERS[name](**options)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=out, flush=True)
        return
    print(json.dumps({"ready": name, "torch": torch.__version__}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(answer(peer, asked["case"], asked["steps"])), file=out, flush=True)


if __name__ == "__main__":
    main()
