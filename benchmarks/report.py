"""Turn pytest-benchmark's JSON into the table that is committed.

python -m pytest benchmarks/test_framework.py --benchmark-enable --benchmark-json=bench.json
python benchmarks/report.py bench.json > results/benchmarks/framework.md
"""

import json
import sys
from pathlib import Path

HEAD = """# What clbench adds to the maths

Ratios against a bare PyTorch loop on the same images in the same process, interleaved A B A B, CPU time, one thread;
the ratio is the median over neighbouring pairs. Milliseconds depend on what else the machine did.

```
python -m pytest benchmarks/test_framework.py --benchmark-enable --benchmark-json=bench.json
python benchmarks/report.py bench.json > results/benchmarks/framework.md
```
"""
SCENARIOS = """# Building scenarios

CPU time of one build of every preset's index tables, on label tables with the sizes of the real data, best of 7. The
ratio is to a budget of 100 ms per 60,000 samples (of the data, or of the stream where that is longer).

```
python -m tox -e benchmarks -- benchmarks/test_scenarios.py --benchmark-json=bench.json
python benchmarks/report.py bench.json > results/benchmarks/scenarios.md
```
"""


def main(path: Path) -> None:
    data = json.loads(path.read_text())
    about_scenarios = all("test_scenarios" in entry["fullname"] for entry in data["benchmarks"])
    machine = data["machine_info"]
    cpu = machine.get("cpu", {})
    where = f"{cpu.get('brand_raw', machine['processor'])}, {cpu.get('count', '?')} cores"
    print(SCENARIOS if about_scenarios else HEAD)
    commit, day = data["commit_info"]["id"][:10], data["datetime"][:10]
    print(f"{where}, Python {machine['python_version']}, commit {commit}, {day}.\n")
    print("| what | ratio or s | budget | clbench, ms | floor, ms | per | met |")
    print("|---|---|---|---|---|---|---|")
    for entry in data["benchmarks"]:
        x = entry["extra_info"]
        floor = "–" if x["floor_ms"] is None else f"{x['floor_ms']:.3f}"
        met = "yes" if x["ratio"] <= x["budget"] else "NO"
        cells = [x["what"], f"{x['ratio']:.3f}", f"{x['budget']:.3g}", f"{x['ours_ms']:.3f}", floor, x["per"], met]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
