"""Records of the real schema for tests of the report: any method, scenario and seed, curves that dip at switches."""

import json
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from clbench.metrics import Curve, list_metrics, summarise
from clbench.store import RunRecord
from clbench.store.environment import environment
from clbench.store.record import ENTRIES
from clbench.store.schema import Hyperparameter

TESTED = 40  # rows of a group's subset, and of its test set


def spec(method: str, scenario: str, seed: int, tasks: int, **changes: Any) -> dict[str, Any]:
    """All fields of a spec; the table of rows follows from the scenario and the order seed, as it does in earnest."""
    order_seed = changes.get("order_seed", seed)
    table = sha256(f"{scenario} {order_seed} {tasks}".encode()).hexdigest()
    return {
        "method": method, "method_file": None,
        "hyperparameters": {
            "lr": {"value": 0.1, "source": "default: card"}, "capacity": {"value": 200, "source": "default"}
        },
        "scenario": scenario, "scenario_params": {"tasks": tasks}, "scenario_fingerprint": table,
        "datasets": ["digits"], "data_fingerprint": "cd" * 32, "setting": "class", "num_tasks": tasks,
        "num_classes": 2 * tasks, "seed": seed, "order_seed": order_seed, "backbone": "mlp", "backbone_options": {},
        "backbone_fingerprint": sha256(str(seed).encode()).hexdigest(), "pretrained_on": [], "weights": None,
        "contaminated": None, "train_view": "", "test_view": "", "batch_size": 10, "epochs": 1,
        "updates_per_batch": 1, "mask": "seen", "eval_every": 1, "eval_dense": 0, "eval_per_group": TESTED,
        "precision": "fp32", "device_type": "cpu", "recipe": None,
        "sources": {"batch_size": "scenario", "eval_every": "scenario", "backbone": "default"}, **changes,
    }  # fmt: skip


def results(rng: np.random.Generator, level: float, tasks: int, steps: int) -> tuple[np.ndarray, np.ndarray, Curve]:
    """(K, K) hits on full test sets, (K, N) right or wrong of every test row, the curve of `steps` updates per task."""
    number = 1 + tasks * steps
    step = np.arange(number)
    task = np.maximum((step - 1) // steps, 0)
    since = np.maximum(step - 1, 0) % steps
    owner = np.arange(tasks)
    dip = 0.3 * np.exp(-since / 3)[:, None] * (owner < task[:, None])
    learned = np.minimum(1, (since[:, None] + 1) / 8)
    share = np.where(owner == task[:, None], 0.95 * learned, level - dip - 0.02 * (task[:, None] - owner))
    hits = rng.binomial(TESTED, np.clip(share, 0.02, 0.98))
    valid = owner <= task[:, None]
    curve = Curve.of(
        steps=step, task=task, position=step * 10, hits=np.where(valid, hits, 0), valid=valid, totals=[TESTED] * tasks,
        groups=[f"task {k}" for k in owner], group_task=owner, task_ends=steps * (owner + 1),
    )  # fmt: skip
    final = np.where(owner <= owner[:, None], np.clip(level - 0.01 * (owner[:, None] - owner), 0, 1), 0)
    right = rng.random((tasks, tasks, TESTED)) < final[..., None]
    return right.sum(axis=2), right.reshape(tasks, -1), curve


def write(
    folder: Path, method: str = "er", scenario: str = "made@1", seed: int = 0, *, level: float = 0.8, tasks: int = 3,
    steps: int = 12, state: str = "done", salt: str = "", cost: dict[str, Any] | None = None, **changes: Any,
) -> Path:  # fmt: skip
    """One record below `folder`. level: accuracy it is around. state: `done` or `unfinished`. changes: of its spec."""
    document = spec(method, scenario, seed, tasks, **changes)
    name = sha256(json.dumps([document, salt], sort_keys=True).encode()).hexdigest()[:12]
    record = RunRecord(folder / scenario / "".join(c if c.isalnum() else "_" for c in method) / name)
    rng = np.random.default_rng([seed, *f"{method} {scenario} {salt}".encode()])
    hits, right, curve = results(rng, level, tasks, steps)
    sizes, targets = [TESTED] * tasks, np.repeat(np.arange(2 * tasks), TESTED // 2)
    with record.lock():
        record.create(document)
        (record.path / "env.json").write_bytes(machine())
        if state == "unfinished":
            return record.path
        record.write_curve(curve, [["train"]] * tasks)
        record.write_matrix(hits / TESTED, curve.groups, sizes=sizes)
        record.write_losses([1], [0], [2.5], ["loss"])
        record.write_predictions(
            np.arange(len(targets)), targets, np.where(right, targets, (targets + 1) % (2 * tasks))
        )
        record.write_summary(
            {
                **summarise(
                    hits / TESTED, group_task=range(tasks), sizes=sizes, setting=document["setting"],
                    mask=document["mask"], curve=curve,
                ),
                "steps": steps * tasks, "images_trained": 10 * steps * tasks, "evaluations": len(curve.steps),
                "times": {"train_s": 2.0 + seed, "evaluate_s": 0.5}, "peak_memory_bytes": 10**8,
                "num_parameters": 1000, "memory_bytes": {"buffer": 12800}, "forward_flops_per_image": 2000,
                "weights_sha256": name * 5, **(cost or {}),
            }
        )  # fmt: skip
        record.finish()
    return record.path


@cache
def machine() -> bytes:
    """env.json of one start here."""
    return ENTRIES.dump_json([environment("cpu", command=["clbench", "run", "--out", "/home/someone/runs"])])


def commit(run: Path, kept: Iterable[str] = ("spec.json", "summary.json")) -> None:
    """What is left of a record in a repository: these files and no more."""
    for path in run.iterdir():
        if path.name not in kept:
            path.unlink()


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file, and of DONE beside it what it vouches for."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(content))
    done = path.parent / "DONE"
    if done.exists():
        marks = json.loads(done.read_text())
        data = path.read_bytes()
        marks["files"][path.name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
        done.write_text(json.dumps(marks))


def many(folder: Path, number: int = 1000) -> None:
    """`number` records: 10 scenarios of 10 tasks with 20 methods each, 5 seeds. The curves of 10 real records are
    shared, so that writing takes seconds; specs, summaries and sizes are each record's own."""
    models = [write(folder / "models", f"model{k}", f"many-{k}@1", 0, tasks=10, steps=40, level=0.6) for k in range(10)]
    rng = np.random.default_rng(0)
    for index in range(number):
        seed, method, scenario = index % 5, index // 5 % 20, index // 100 % 10
        source = models[scenario]
        document = spec(f"method{method:02d}", f"many-{scenario}@1", seed, 10)
        run = folder / "runs" / document["scenario"] / document["method"] / f"{index:012x}"
        run.mkdir(parents=True)
        for file in source.iterdir():
            if file.name != ".lock":
                (run / file.name).write_bytes(file.read_bytes())
        edit(run / "spec.json", **document)
        summary = json.loads((run / "summary.json").read_text())
        noise = {m.key: min(max(summary[m.key] + 0.02 * method - 0.2 + rng.normal(0, 0.01), 0), 1)
                 for m in list_metrics() if m.unit == "fraction" and summary.get(m.key) is not None}  # fmt: skip
        edit(run / "summary.json", **noise, weights_sha256=f"{index:064x}")


def hyperparameter(value: Any, source: str) -> dict[str, Any]:
    return Hyperparameter(value=value, source=source).model_dump()
