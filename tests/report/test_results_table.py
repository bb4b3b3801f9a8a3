"""The final table, as rows and on a narrow terminal."""

import io

import pytest
from rich.console import Console

from clbench.errors import InputError
from clbench.metrics import find_metric
from clbench.report.table import level_rows, main_metrics, result_rows, results_table, table_note

FIRST = {
    "final_accuracy": 0.8, "forgetting": -0.0001, "min_accuracy": 0.5, "min_accuracy_se": 0.02, "wf_10": None,
    "recovery_iterations": 4.0, "recovery_missing": 0, "evaluations": 75, "steps": 75,
}  # fmt: skip
SECOND = {
    "final_accuracy": 0.9, "forgetting": 0.1, "min_accuracy": 0.6, "min_accuracy_se": 0.03, "wf_10": None,
    "recovery_iterations": 5.5, "recovery_missing": 2, "evaluations": 12, "steps": 75,
}  # fmt: skip
RUNS = [FIRST, SECOND]


def test_rows_by_hand() -> None:
    rows = result_rows([3, 5], RUNS, ["final_accuracy", "forgetting", "min_accuracy", "wf_10", "recovery_iterations"])
    assert [list(row.values()) for row in rows] == [
        ["seed 3", "80.0", "0.0", "50.0", "-", "4.0"],
        ["seed 5", "90.0", "10.0", "60.0", "-", "5.5*"],
        ["mean", "85.0", "5.0", "55.0", "-", "4.8"],
        ["std", "7.1", "7.1", "7.1", "-", "1.1"],
        ["95 % ±", "63.5", "63.6", "63.5", "-", "9.5"],
        ["subset ±", "-", "-", "3.0", "-", "-"],
    ]


def test_one_seed_has_no_spread() -> None:
    assert [row["run"] for row in result_rows([0], RUNS[:1])] == ["seed 0", "subset ±"]
    assert [row["run"] for row in result_rows([0], RUNS[:1], ["final_accuracy"])] == ["seed 0"]


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(InputError, match="did you mean 'final_accuracy'"):
        result_rows([0], RUNS[:1], ["final_acuracy"])


def test_it_fits_80_columns_without_cutting_a_word() -> None:
    text = io.StringIO()
    Console(file=text, width=80).print(results_table([0, 1], RUNS, title="er on split-digits@1 [bold]"))
    shown = text.getvalue()
    assert "…" not in shown
    assert "er on split-digits@1 [bold]" in shown
    assert "never recovered" in shown
    titles = [find_metric(key).title for key in main_metrics()]
    assert {word for title in titles for word in title.split()} <= set(shown.split())
    assert len(titles) == 7


def test_the_note_says_when_minima_were_not_looked_for_at_every_step() -> None:
    assert "by 12 evaluations in 75 steps" in table_note(result_rows([0, 1], RUNS), RUNS)
    assert "evaluations in" not in table_note(result_rows([0], RUNS[:1]), RUNS[:1])
    accuracy = result_rows([0, 1], RUNS, ["final_accuracy"])
    assert "evaluations in" not in table_note(accuracy, RUNS)


def test_a_protocol_shows_its_own_measures_first() -> None:
    by_samples = [{"f_last": 0.1, "a_auc": 0.5, "a_last": 0.6, "average_incremental_accuracy": 0.4}]
    assert main_metrics(by_samples) == ["a_auc", "a_last", "f_last", "average_incremental_accuracy"]
    domains = [{"transfer": 0.5, "avg": 0.6, "last": 0.7, "forgetting": 0.1, "final_accuracy": 0.7}]
    assert main_metrics(domains, multi_domain=True) == ["transfer", "avg", "last", "forgetting"]


def test_label_levels_have_rows_of_their_own() -> None:
    levels = [{"level": 0, "a_auc": 0.5, "a_avg": 0.25, "a_last": 0.75, "f_last": None}]
    assert level_rows([3, 4], [{**FIRST, "levels": levels}, FIRST]) == [
        {"run": "seed 3", "level": "0", "A_AUC": "50.0", "A_avg": "25.0", "A_last": "75.0", "F_last": "-"}
    ]
