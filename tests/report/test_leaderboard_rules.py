"""What may stand in one table, what is one row, and what is left out or named."""

from pathlib import Path

import pytest
from made import commit, edit, hyperparameter, write

from clbench.errors import InputError
from clbench.report.leaderboard import Written, write_report
from clbench.report.leaderboard.boards import Board, make_boards
from clbench.report.leaderboard.records import gather, hide_folders


def boards_of(*folders: Path) -> list[Board]:
    return make_boards(gather(folders)[0])[0]


def report(tmp_path: Path, *folders: Path) -> tuple[Written, str]:
    written = write_report(folders or (tmp_path / "runs",), tmp_path / "out", date="2026-01-01")
    return written, (tmp_path / "out" / "leaderboard.md").read_text()


def test_seeds_are_one_row_and_better_rows_come_first(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, "er", seed=seed, level=0.6)
        write(tmp_path, "clib", seed=seed, level=0.9)
    (board,) = boards_of(tmp_path)
    assert [row.method for row in board.rows] == ["clib", "er"]
    found = board.rows[0].stats["final_accuracy"]
    assert found.num == 3
    assert found.mean == pytest.approx(sum(board.rows[0].values("final_accuracy").values()) / 3)
    assert board.rows[0].missing == []


@pytest.mark.parametrize(
    "change",
    [
        {"scenario": "made@2"}, {"scenario_params": {"tasks": 3, "per_class": 10}}, {"data_fingerprint": "ee" * 32},
        {"setting": "domain"}, {"mask": "all"}, {"protocol_family": "A"},
        {"protocol_family": "A", "protocol_changes": ["batch_size"]},
    ],
)  # fmt: skip
def test_what_may_not_be_compared_is_another_table(tmp_path: Path, change: dict[str, object]) -> None:
    scenario = str(change.pop("scenario", "made@1"))
    write(tmp_path, "er")
    write(tmp_path, "clib", scenario, **change)
    boards = boards_of(tmp_path)
    assert [len(board.rows) for board in boards] == [1, 1]
    assert len({board.label for board in boards}) == 2


def test_a_family_with_changed_settings_is_apart_from_the_family(tmp_path: Path) -> None:
    write(tmp_path, "er", protocol_family="A")
    write(tmp_path, "clib", protocol_family="A", protocol_changes=["batch_size 10 -> 50"])
    first, second = sorted(boards_of(tmp_path), key=lambda board: board.label)
    assert (first.label, second.label) == ("made@1, family A", "made@1, family A, changed")
    assert any("changed settings of protocol family A" in note for note in second.notes)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 5}, {"batch_size": 64}, {"updates_per_batch": 3}, {"backbone": "flatten"},
        {"method_file": "aa" * 32},
        {"hyperparameters": {"lr": hyperparameter(0.1, "default"), "capacity": hyperparameter(5000, "--set")}},
        {"pretrained_on": ["imagenet"], "weights": "net.safetensors"},
    ],
)  # fmt: skip
def test_another_budget_is_another_row_never_more_seeds(tmp_path: Path, change: dict[str, object]) -> None:
    write(tmp_path, "er", seed=0)
    write(tmp_path, "er", seed=1, **change)
    (board,) = boards_of(tmp_path)
    assert [len(row.runs) for row in board.rows] == [1, 1]
    assert len({row.label for row in board.rows}) == 2, "rows of one method must be told apart"


def test_where_and_how_densely_a_run_was_watched_is_no_other_row(tmp_path: Path) -> None:
    write(tmp_path, "er", seed=0)
    write(tmp_path, "er", seed=1, eval_every=7, device_type="cuda")
    (board,) = boards_of(tmp_path)
    assert [len(row.runs) for row in board.rows] == [2]
    assert board.rows[0].schedule.startswith("mixed")
    assert any("CPUs and GPUs" in note for note in board.notes)


def test_another_schedule_is_neither_ranked_nor_tested_by_curve_metrics(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path, "er", seed=seed)
        write(tmp_path, "clib", seed=seed)
        write(tmp_path, "nmc", seed=seed, eval_every=20)
    (board,) = boards_of(tmp_path)
    odd = next(row for row in board.rows if row.method == "nmc")
    assert board.comparable(odd, "final_accuracy")
    assert not board.comparable(odd, "min_accuracy")
    assert any("another schedule" in note for note in board.notes)


def test_conflicting_tables_of_one_order_seed_are_separated_with_the_reason(tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path / "ours", "er", seed=seed)
        write(tmp_path / "ours", "clib", seed=seed)
    write(tmp_path / "theirs", "mvp", seed=0, scenario_fingerprint="00" * 32)
    write(tmp_path / "theirs", "mvp", seed=1)  # the same row and folder: most likely of the same other builder
    boards = boards_of(tmp_path / "ours", tmp_path / "theirs")
    assert [sorted(row.method for row in board.rows) for board in boards] == [["clib", "er"], ["mvp"]]
    assert "order seed 0" in boards[1].notes[0]
    assert "0" * 12 in boards[1].notes[0]
    assert boards[0].label != boards[1].label


def test_missing_unfinished_and_damaged_seeds_are_shown(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for seed in range(4):
        write(runs, "er", seed=seed)
    write(runs, "clib", seed=0)
    write(runs, "clib", seed=1, state="unfinished")
    broken = write(runs, "clib", seed=2)
    (broken / "summary.json").write_text("{not json")
    written, text = report(tmp_path)
    row = next(row for row in written.boards[0].rows if row.method == "clib")
    assert (list(row.runs), row.missing) == ([(0, 0)], [(3, 3)])
    assert {seed: run.state for seed, run in row.pending.items()} == {(1, 1): "unfinished", (2, 2): "damaged"}
    assert "1 (2 damaged or unfinished) (1 missing)" in text
    assert "seed 2 is damaged" in text


def test_a_row_without_a_finished_run_is_last_and_has_no_rank(tmp_path: Path) -> None:
    write(tmp_path / "runs", "er", level=0.2)
    write(tmp_path / "runs", "clib", state="unfinished")
    _, text = report(tmp_path)
    assert text.index("| 1 | er |") < text.index("| – | clib |")


def test_a_record_whose_spec_is_damaged_is_named_and_stops_nothing(tmp_path: Path) -> None:
    write(tmp_path / "runs", "er")
    broken = write(tmp_path / "runs", "clib")
    (broken / "spec.json").write_bytes(b"\x00\xff")
    written, text = report(tmp_path)
    assert [row.method for row in written.boards[0].rows] == ["er"]
    (item,) = written.left_out
    assert item.name == f"runs/made@1/clib/{broken.name}"
    assert "damaged" in item.why
    assert str(tmp_path) not in item.why, "no folder of this machine on the page"
    assert broken.name in text


def test_a_damaged_curve_is_named_and_the_numbers_are_counted(tmp_path: Path) -> None:
    run = write(tmp_path / "runs", "er")
    commit(run, ("spec.json", "summary.json", "curve.parquet", "matrix.csv"))
    (run / "curve.parquet").write_bytes(b"PAR1 no")
    written, _ = report(tmp_path)
    assert len(written.boards[0].rows[0].runs) == 1
    assert "curve.parquet is damaged" in written.left_out[0].why


def test_committed_summaries_count_and_a_killed_run_does_not(tmp_path: Path) -> None:
    commit(write(tmp_path, "er"))
    killed = write(tmp_path, "er", seed=1)
    (killed / "DONE").unlink()  # its .lock is still there
    (board,) = boards_of(tmp_path)
    assert (list(board.rows[0].runs), list(board.rows[0].pending)) == ([(0, 0)], [(1, 1)])


def test_the_same_run_in_two_folders_is_counted_once(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder, "er")
        write(tmp_path / folder, "er", seed=1)
    written, _ = report(tmp_path, tmp_path / "a", tmp_path / "b")
    assert written.boards[0].rows[0].stats["final_accuracy"].num == 2
    (item,) = written.left_out
    assert item.name.startswith("b/")
    assert "counted once" in item.why


def test_another_result_of_the_same_seed_is_a_conflict_and_named(tmp_path: Path) -> None:
    write(tmp_path / "a", "er")
    other = write(tmp_path / "b", "er")
    edit(other / "summary.json", final_accuracy=0.123)
    written, text = report(tmp_path, tmp_path / "a", tmp_path / "b")
    row = written.boards[0].rows[0]
    assert row.stats["final_accuracy"].num == 1
    assert row.stats["final_accuracy"].mean != 0.123
    assert "conflicts with a/made@1/er" in written.left_out[0].why
    assert "final_accuracy" in written.left_out[0].why
    assert "two records disagree" in text


def test_others_results_merge_in_as_rows(tmp_path: Path) -> None:
    for seed in range(2):
        write(tmp_path / "ours", "er", seed=seed)
        commit(write(tmp_path / "theirs", "mymethod", seed=seed, method_file="ab" * 32, level=0.95))
    (board,) = boards_of(tmp_path / "ours", tmp_path / "theirs")
    assert [(row.method, len(row.runs)) for row in board.rows] == [("mymethod", 2), ("er", 2)]


def test_trials_of_a_study_are_no_results(tmp_path: Path) -> None:
    study = tmp_path / "study"
    write(study / "trials", "er", seed=0)
    write(study / "evaluation", "er", seed=1)
    (study / "study.json").write_text("{}")
    runs, out = gather([tmp_path])
    assert [run.known.seed for run in runs] == [1]
    assert out[0].name == "1 trials of studies"


def test_contaminated_rows_are_marked(tmp_path: Path) -> None:
    write(tmp_path / "runs", "er", contaminated="pretrained on cifar100")
    _, text = report(tmp_path)
    assert "contaminated: pretrained on cifar100" in text
    assert "had seen the images" in text


def test_an_older_record_is_migrated(tmp_path: Path) -> None:
    old = write(tmp_path, "er", seed=0)
    summary = old / "summary.json"
    import json

    content = json.loads(summary.read_text())
    for key in ("a_auc", "f_last", "memory_per_task", "levels"):
        del content[key]
    summary.write_text(json.dumps({**content, "schema_version": 1}))
    edit(summary)
    spec = json.loads((old / "spec.json").read_text())
    del spec["eval_samples"]
    (old / "spec.json").write_text(json.dumps({**spec, "schema_version": 1}))
    edit(old / "spec.json")
    write(tmp_path, "er", seed=1)
    (board,) = boards_of(tmp_path)
    assert len(board.rows[0].runs) == 2
    assert board.rows[0].stats["a_auc"].num == 1


def test_an_empty_and_a_missing_folder_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run record below"):
        write_report([tmp_path], tmp_path / "out")
    with pytest.raises(InputError, match="there is no folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "out")


def test_folders_of_the_machine_are_hidden() -> None:
    said = "clbench run --out /home/me/runs --weights=/data/x/net.pt --data ~/sets/cifar --set lr=1/2 --view 'a/b'"
    assert hide_folders(said) == (
        "clbench run --out …/runs --weights=…/net.pt --data …/cifar --set lr=1/2 --view 'a/b'"
    )
