"""Turn pytest-benchmark's JSON into the table that is committed.

python -m tox -e benchmarks -- --benchmark-json=bench.json
python benchmarks/report.py bench.json > results/benchmarks/framework.md
"""

import json
import sys
from pathlib import Path

HEAD = """# What clbench adds to the maths

Ratios against a bare PyTorch loop on the same images in the same process, interleaved A B A B, CPU time, one thread;
the ratio is the median over neighbouring pairs. Milliseconds depend on what else the machine did.

```
python -m tox -e benchmarks -- --benchmark-json=bench.json
python benchmarks/report.py bench.json > results/benchmarks/framework.md
```
"""


def main(path: Path) -> None:
    data = json.loads(path.read_text())
    machine = data["machine_info"]
    cpu = machine.get("cpu", {})
    where = f"{cpu.get('brand_raw', machine['processor'])}, {cpu.get('count', '?')} cores"
    print(HEAD)
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
