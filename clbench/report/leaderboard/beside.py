"""Published numbers next to ours, each with its status and with what differs between their setting and ours."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from clbench.report.leaderboard.boards import Board, Row, preset_params

if TYPE_CHECKING:
    from clbench.report.published import Published

__all__ = ["Beside", "beside_board", "beside_row", "changed_params"]


class Beside(NamedTuple):
    """A published number. differs: what is known to differ from the row, or from the board, in words; empty if nothing
    that either side records."""

    number: "Published"
    differs: tuple[str, ...]


def beside_row(board: Board, row: Row) -> list[Beside]:
    """Published numbers for a row's method on its scenario, those in the same setting first."""
    found = [Beside(item, _differs(board, item, _values(row))) for item in _of(board) if item.method == row.method]
    return sorted(found, key=lambda each: (len(each.differs), each.number.status != "verified"))


def beside_board(board: Board) -> list[Beside]:
    """Published numbers on the scenario for methods that the board has no row of."""
    ours = {row.method for row in board.rows}
    found = [Beside(item, _differs(board, item, {})) for item in _of(board) if item.method not in ours]
    return sorted(found, key=lambda each: (each.number.metric, each.number.method))


def changed_params(board: Board) -> dict[str, Any]:
    """Parameters of the scenario that are not the preset's, of those a table is built from."""
    preset = preset_params(board.scenario)
    if preset is None:
        return {}
    ours = {**board.spec.scenario_params, "dataset": ",".join(sorted(board.spec.datasets))}
    return {key: value for key, value in ours.items() if preset.get(key) != value}


def _of(board: Board) -> "list[Published]":
    return [item for item in _load() if item.scenario == board.scenario.partition("@")[0]]


@cache
def _load() -> "Sequence[Published]":
    from clbench.report.published import load

    return tuple(load())


def _values(row: Row) -> dict[str, Any]:
    spec = row.spec
    return {
        **{name: entry.value for name, entry in spec.hyperparameters.items()},
        "backbone": spec.backbone, "epochs": spec.epochs, "batch_size": spec.batch_size,
        "updates_per_batch": spec.updates_per_batch, "mask": spec.mask,
    }  # fmt: skip


def _differs(board: Board, item: "Published", ours: Mapping[str, Any]) -> tuple[str, ...]:
    known = {**board.spec.scenario_params, **ours}
    found = [
        f"{name}: theirs {value}, ours {known[name]}"
        for name, value in item.setting.items()
        if name in known and str(known[name]).lower() != str(value).lower()
    ]
    said = {name for name in item.setting if name in known}
    found += [
        f"{name}={value} changed from the preset" for name, value in changed_params(board).items() if name not in said
    ]
    return tuple(found)
