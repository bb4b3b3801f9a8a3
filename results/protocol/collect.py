"""Turn the studies of `run.sh` into what is committed: study and evaluation files, small records of the evaluation runs
(for the leaderboard), reports, and table.md.

python results/protocol/collect.py results/studies
"""

import shutil
import sys
from pathlib import Path

from clbench.protocol.evaluation import load_evaluation
from clbench.protocol.study import load_study
from clbench.protocol.verify import against_records
from clbench.store import RunRecord

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from collect import keep  # noqa: E402


def main(folder: Path) -> None:
    kept = HERE / "studies"
    for path in sorted(folder.glob("*/*/*/study.json")):
        problems = against_records(path, load_study(path))
        evaluations = sorted((path.parent / "evaluation").glob("*.json"))
        for evaluation in evaluations:
            problems += against_records(evaluation, load_evaluation(evaluation))
        if problems:
            raise SystemExit("\n".join(problems))
        target = kept / path.parent.relative_to(folder)
        (target / "evaluation").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        for evaluation in evaluations:
            shutil.copy(evaluation, target / "evaluation")
            for run in load_evaluation(evaluation)["runs"]:
                if run["status"] == "done":
                    keep(
                        RunRecord(path.parent / "evaluation" / run["run"]),
                        HERE / "runs" / path.parent.name / run["run"],
                    )
    lines = []
    for report in sorted(folder.glob("*--*/report.md")):
        shutil.copytree(report.parent, HERE / "reports" / report.parent.name, dirs_exist_ok=True)
        head, _, _ = report.read_text(encoding="utf-8").partition("\n## ")
        lines.append(head.strip() + "\n")
    (HERE / "table.md").write_text("\n".join(lines).replace("# Tuned", "## Tuned"), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
