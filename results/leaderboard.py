"""Make the committed leaderboard again, from the small records that are committed under results/.

python results/leaderboard.py [DATE]

The same as `clbench report --runs results/... --out results/leaderboard`; the date is a commit's, so that the same
records give the same files byte for byte.
"""

import subprocess
import sys
from pathlib import Path

from clbench.report.leaderboard import write_report

HERE = Path(__file__).parent
OUT = HERE / "leaderboard"


def main(date: str) -> None:
    folders = [relative(path) for path in sorted(HERE.glob("*/runs"))]  # not results/runs, which git ignores
    written = write_report(folders, OUT, date=date)
    for item in written.left_out:
        print(f"{item.name}: {item.why}")
    print(f"{len(written.boards)} tables from {len(folders)} folders, in {OUT}")


def relative(path: Path) -> Path:
    """As seen from the root of the repository, where the page names records from."""
    return path.relative_to(HERE.parent) if Path.cwd() == HERE.parent else path


def last_change() -> str:
    """Date of the last commit that touched a committed record."""
    words = ["git", "-C", str(HERE), "log", "-1", "--format=%cs", "--", ":(glob)*/runs/**"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() or "not committed yet"


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else last_change())
