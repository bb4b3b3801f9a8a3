"""How much CPU time building a preset's index tables takes, on label tables with the sizes of the real data.

python -m tox -e benchmarks -- benchmarks/test_scenarios.py --benchmark-json=bench.json
python benchmarks/report.py bench.json > results/benchmarks/scenarios.md
"""

import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "tests" / "scenarios"))

from label_tables import real_layout

from clbench.scenarios import build, find, list_scenarios

BUDGET_MS = 100.0  # for 60,000 samples of the data, or of the stream where that is longer
SAMPLES = 60_000
REPEATS = 7


@pytest.mark.parametrize("id", [row["id"] for row in list_scenarios()])
def test_build(benchmark, id: str) -> None:
    preset = find(id)
    tables = [real_layout(name) for name in preset.datasets]

    def make():
        return build(preset, tables, 1)

    scenario = benchmark.pedantic(make, rounds=1, iterations=1, warmup_rounds=1)
    times = []
    for _ in range(REPEATS):
        begin = time.process_time()
        make()
        times.append(1e3 * (time.process_time() - begin))
    rows = sum(len(table.labels) for table in tables)
    size = max(rows, scenario.offsets[-1], SAMPLES)
    best = min(times)
    benchmark.extra_info.update(
        what=f"{id}: {rows:,} rows, stream of {scenario.offsets[-1]:,}",
        budget=1.0, ratio=round(best / (BUDGET_MS * size / SAMPLES), 3), ours_ms=round(best, 2), floor_ms=None,
        per="build", better="low",
    )  # fmt: skip
