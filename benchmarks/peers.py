"""clbench, a bare PyTorch loop and other frameworks on the same scenario, model, batches and evaluation, interleaved.

python benchmarks/peers.py --avalanche-python PATH --mammoth CHECKOUT --mammoth-python PATH [--device cpu|cuda]

Every peer is a process of its own (`peer_worker.py`; Avalanche's in its own interpreter if it cannot be imported
here), and all are asked in turn, A B C A B C ..., one at a time. Writes `peers-<device>.md` and `peers-<device>.png`.
On a CPU, times are CPU times of one thread, which other load on the machine changes little; on a GPU wall-clock times.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CASES = {  # case -> what it is, per what, steps of one turn on a CPU and on a GPU
    "step": ("one ER step, model that costs nothing", "step", 40, 100),
    "load": ("stream + replay batch, no model", "step", 40, 100),
    "evaluation": ("one evaluation of {eval_images} images, model that costs nothing", "evaluation", 4, 10),
    "end to end": ("ER step and evaluation behind it, reduced ResNet-18 (nf={width})", "iteration", 3, 10),
}
GRAPHS = """`clbench`: with `--cuda-graph`, `--evaluator graph` and the deterministic algorithms of every run, images on
the device, as the bare loop has them; the others launch their kernels one by one. No TF32 anywhere.
"""
EXTRA = {"step, whole tasks": ("the same with `Replay` on whole tasks", "step", 40, 100)}
MAMMOTH = """ `mammoth`: its model `er`, its loaders
(without worker processes) and its `evaluate` (batches of 10, as it makes them), PIL images through ToTensor and
Normalize; no progress bar, logger and memory tracker. See `benchmarks/peer_mammoth.py`."""
SIZES = {  # on a CPU small, since the mathematics is the same for all
    "cpu": {"width": 8, "eval_images": 500, "stream_per_class": 200},
    "cuda": {"width": 20, "eval_images": 1000, "stream_per_class": 500},
}


class Worker:
    """A peer's process. `about`: what it said first; `missing` in it if it cannot run."""

    def __init__(self, name: str, python: str, options: dict[str, Any]) -> None:
        self.name = name
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name("peer_worker.py")), name, json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.about = self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} broke (exit code {self.process.wait()}); what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, case: str, steps: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps({"case": case, "steps": steps}), file=self.process.stdin, flush=True)
        return self.read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(
    workers: list[Worker], cases: dict[str, tuple], cuda: bool, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """case -> peer -> milliseconds per step of every round, the first round (warm-up) left out."""
    unit, found = "wall_ms" if cuda else "cpu_ms", {}
    for case, (_, _, on_cpu, on_gpu) in cases.items():
        found[case] = {worker.name: [] for worker in workers}
        for turn in range(rounds + 1):
            for worker in workers:
                answer = worker.ask(case, on_gpu if cuda else on_cpu)
                if "missing" not in answer and turn > 0:
                    found[case][worker.name].append(answer[unit])
        print(case, {name: round(statistics.median(v), 3) for name, v in found[case].items() if v}, file=sys.stderr)
    return found


def ratio(times: dict[str, list[float]], peer: str, floor: list[float]) -> float:
    """Median over rounds of a peer's time over the floor's in the same round."""
    return statistics.median(a / b for a, b in zip(times[peer], floor, strict=True))


def table(
    found: dict[str, dict[str, list[float]]], cases: dict[str, tuple], sizes: dict[str, Any], peers: list[str]
) -> str:
    titles = ["what", "per", *(f"{p}, ms" for p in peers), *(f"{p} / floor" for p in peers[1:])]
    theirs = peers[2:]
    titles += [f"{p} / clbench" for p in theirs]
    lines = [f"| {' | '.join(titles)} |"]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for case, (what, per, *_) in cases.items():
        times = found[case]
        floor = times["floor"] or found["step"]["floor"]
        ms = [f"{statistics.median(times[p]):.3f}" if times[p] else "–" for p in peers]
        over = [f"{ratio(times, p, floor):.2f}" if times[p] else "–" for p in peers[1:]]
        cells = [what.format(**sizes), per, *ms, *over]
        ours = times["clbench"] or found["step"]["clbench"]
        cells += [f"{ratio(times, p, ours):.1f}" if times[p] else "–" for p in theirs]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, dict[str, list[float]]], sizes: dict[str, Any], peers: list[str], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shown = ["step", "load", "evaluation", "end to end"]
    figure, axes = plt.subplots(figsize=(8.5, 4))
    width = 0.8 / len(peers)
    colours = {
        "floor": "#9a9a9a",
        "clbench": "#1b6ca8",
        "avalanche": "#e3a06b",
        "avalanche-pil": "#c4561a",
        "mammoth": "#7a5aa6",
    }
    for place, peer in enumerate(peers):
        bars = [(n, ratio(found[c], peer, found[c]["floor"])) for n, c in enumerate(shown) if found[c][peer]]
        at = [n + (place - (len(peers) - 1) / 2) * width for n, _ in bars]
        axes.bar(at, [value for _, value in bars], width * 0.92, label=peer, color=colours[peer])
        for x, (_, value) in zip(at, bars, strict=True):
            axes.text(x, value * 1.06, f"{value:.2f}" if value < 10 else f"{value:.0f}", ha="center", fontsize=8)
    axes.set_yscale("log")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("time / time of the bare loop")
    axes.set_xticks(
        range(len(shown)),
        ["ER step,\nno model", "batches only", f"evaluation of {sizes['eval_images']},\nno model",
         f"ER + evaluation every\niteration, ResNet-18 (nf={sizes['width']})"],
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.15)
    axes.legend(frameon=False, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--avalanche-python", default=None, help="an interpreter that has avalanche-lib, torch, clbench's needs"
    )
    parser.add_argument("--mammoth", type=Path, default=None, help="a checkout of github.com/aimagelab/mammoth")
    parser.add_argument(
        "--mammoth-python", default=sys.executable, help="an interpreter that has its needs and clbench's"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "benchmarks")
    for name in SIZES["cpu"]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None)
    given = parser.parse_args()
    sizes = {key: getattr(given, key) or value for key, value in SIZES[given.device].items()}
    options = {"device": given.device, **sizes}
    pythons = {"floor": sys.executable, "clbench": sys.executable}
    if given.avalanche_python or importlib.util.find_spec("avalanche"):
        pythons["avalanche"] = pythons["avalanche-pil"] = given.avalanche_python or sys.executable
    if given.mammoth:
        pythons["mammoth"] = given.mammoth_python
    extra = {"mammoth": {"mammoth": str(given.mammoth and given.mammoth.resolve())}}
    workers = [Worker(name, python, {**options, **extra.get(name, {})}) for name, python in pythons.items()]
    for worker in workers:
        if "missing" in worker.about:
            print(f"{worker.name} is left out: {worker.about['missing']}", file=sys.stderr)
    workers = [worker for worker in workers if "missing" not in worker.about]
    peers = [worker.name for worker in workers]
    cases = {**CASES, **(EXTRA if "avalanche" in peers else {})}
    found = measure(workers, cases, given.device == "cuda", given.rounds)
    for worker in workers:
        worker.close()
    versions = ", ".join(f"{worker.name} on torch {worker.about['torch']}" for worker in workers)
    checkout = " --mammoth CHECKOUT --mammoth-python PYTHON" if "mammoth" in peers else ""
    kind = "wall-clock" if given.device == "cuda" else "CPU"
    given.out.mkdir(parents=True, exist_ok=True)
    head = f"""# clbench and its peers, on a {"GPU" if given.device == "cuda" else "CPU"}

Same random images of CIFAR's shape, online stream of 5 tasks of 2 classes, batches of 10 and 10 replayed, full buffer
of 500, SGD, {sizes["eval_images"]} test images in 5 groups. Peers are asked in turn, {given.rounds} rounds; {kind}
milliseconds, medians; ratios are medians over the rounds of neighbours. The bare loop evaluates in batches of the size
that clbench has. `avalanche`: fed with uint8 images from memory (as `clbench.interop` does), its fast case;
`avalanche-pil`: with PIL images through ToTensor and Normalize, as torchvision's data sets do. Its online stream has
one experience per batch, and a reservoir.
{GRAPHS if given.device == "cuda" else ""}See `benchmarks/peer_worker.py`.{MAMMOTH if "mammoth" in peers else ""}

```
python benchmarks/peers.py --device {given.device} --rounds {given.rounds} --avalanche-python PYTHON{checkout}
```

{platform.machine()}, {os.cpu_count()} cores, one thread; {versions}; {datetime.now(UTC):%Y-%m-%d}.

"""
    text = head + table(found, cases, sizes, peers) + "\n"
    (given.out / f"peers-{given.device}.md").write_text(text)
    draw(found, sizes, peers, given.out / f"peers-{given.device}.png")
    print(text)


if __name__ == "__main__":
    main()
