import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from label_tables import real_layout
from tiny import make_store, split_scenario

from clbench.data import load
from clbench.data.loading import pixel_digests
from clbench.errors import InputError
from clbench.interop.rows import data_fingerprint
from clbench.interop.tables import export_parquet, read_parquet
from clbench.scenarios import build, find, list_scenarios
from clbench.scenarios.model import Scenario

ROOT = Path(__file__).parents[2]
IDS = [row["id"] for row in list_scenarios()]


def build_on_layout(id: str, **params: str) -> tuple[Scenario, list]:
    preset = find(id).with_params(params)
    tables = [real_layout(name) for name in preset.datasets]
    return build(preset, tables, 7), tables


@pytest.mark.parametrize("id", IDS)
def test_every_preset_comes_back(id: str, tmp_path: Path) -> None:
    scenario, tables = build_on_layout(id)
    path = export_parquet(scenario, tmp_path / "x.parquet", tables)
    back = read_parquet(path)
    assert back.fingerprint == scenario.fingerprint
    assert back.defaults == scenario.defaults
    assert back.recall == scenario.recall
    assert [t.name for t in back.tasks] == [t.name for t in scenario.tasks]
    assert json.dumps(back.params) == json.dumps(dict(scenario.params))


def test_columns_say_what_the_scenario_says(tmp_path: Path) -> None:
    scenario, tables = build_on_layout("split-digits", val_share="0.1", online="true")
    frame = pq.read_table(export_parquet(scenario, tmp_path / "x.parquet", tables)).to_pandas()
    train = frame[frame.part == "train"]
    assert train.position.tolist() == list(range(scenario.offsets[-1]))
    for index, task in enumerate(scenario.tasks):
        own = train[train.task == index]
        assert own.row.tolist() == task.rows.tolist()
        assert own.target.tolist() == task.targets.tolist()
        val = frame[(frame.part == "val") & (frame.task == index)]
        assert task.val is not None
        assert val.row.tolist() == task.val[0].tolist()
    for index, group in enumerate(scenario.groups):
        own = frame[frame.group == index]
        assert set(own.part) == {"test"}
        assert own.row.tolist() == group.rows.tolist()
        assert set(own.task) == {group.task}
    assert frame.domain.isna().all()
    assert "sha256" not in frame


def test_domains_repeats_and_data(tmp_path: Path) -> None:
    scenario, tables = build_on_layout("power-law-digits")
    table = pq.read_table(export_parquet(scenario, tmp_path / "x.parquet", tables, row_order="source", size=32))
    about = json.loads(table.schema.metadata[b"clbench"])
    frame = table.to_pandas()
    last = frame[(frame.part == "train") & (frame.task == 4)]
    assert last.row.duplicated().any()  # rehearsal: rows of other tasks, through their own domains
    assert last.domain.nunique() == 5
    assert about["domains"]["kind"] == "permutation"
    assert np.array_equal(about["domains"]["table"], scenario.domains.table)
    assert about["data"] == [
        {"name": "digits", "fingerprint": "0" * 64, "first_row": 0, "num_rows": 1797, "num_train": 1438,
         "row_order": "source", "size": 32}
    ]  # fmt: skip


def test_odd_tables(tmp_path: Path) -> None:
    """Empty tasks, empty validation parts, domains that are there but empty, groups of no task."""
    store = make_store()
    base = split_scenario(store)
    empty = torch.empty(0, dtype=torch.int64)
    tasks = (
        base.tasks[0]._replace(val=(empty, empty)),
        base.tasks[1]._replace(rows=empty, targets=empty, classes=empty, domain=empty),
        base.tasks[2]._replace(classes=torch.arange(2, 6), val=(base.tasks[1].rows, base.tasks[1].targets)),
    )
    groups = (base.groups[0]._replace(task=None, level=0), base.groups[1]._replace(classes=torch.tensor([3, 2])))
    odd = replace(base, tasks=tasks, groups=groups, prompts={1: ("a photo of {}", "{}")}, params={"a": [1, None]})
    back = read_parquet(export_parquet(odd, tmp_path / "deep" / "x.parquet", [store.table()]))
    assert back.fingerprint == odd.fingerprint
    assert back.groups[1].classes.tolist() == [3, 2]
    assert back.tasks[1].domain is not None
    assert back.prompts == {1: ("a photo of {}", "{}")}


def test_digests_and_fingerprint_name_the_images(tmp_path: Path) -> None:
    store = load("digits")
    digests = pixel_digests(store.images.numpy())
    scenario = build(find("split-digits"), [store.table()], 0)
    path = export_parquet(scenario, tmp_path / "x.parquet", [store.table()], digests=digests)
    frame = pq.read_table(path).to_pandas()
    for row, text in frame[["row", "sha256"]].iloc[::400].itertuples(index=False):
        assert hashlib.sha256(store.images[row].numpy().tobytes()).hexdigest() == text
    made = data_fingerprint(store.images.numpy(), store.labels.numpy(), store.split.numpy())
    assert made == store.fingerprint


def test_python_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """What the page tells other frameworks to do works without clbench."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/interop.md").read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    store = load("digits")
    scenario = build(find("split-digits"), [store.table()], 0)
    export_parquet(scenario, "split-digits.parquet", [store.table()])
    names: dict = {}
    exec(blocks[0], names)
    assert names["first_task"].tolist() == scenario.tasks[0].rows.tolist()
    assert capsys.readouterr().out.startswith("class ['0', '1'")
    exec(blocks[1], names)
    arrays = (store.images.numpy(), store.labels.numpy(), store.split.numpy())
    assert names["fingerprint"](*arrays) == store.fingerprint == names["about"]["data"][0]["fingerprint"]


def test_rows_count_through_the_data_sets(tmp_path: Path) -> None:
    scenario, tables = build_on_layout("mtil-small")
    about = json.loads(pq.read_schema(export_parquet(scenario, tmp_path / "x.parquet", tables)).metadata[b"clbench"])
    assert [part["name"] for part in about["data"]] == list(scenario.datasets)
    assert [part["first_row"] for part in about["data"]] == np.cumsum([0, *(len(t.labels) for t in tables)])[
        :-1
    ].tolist()
    for task, part in zip(scenario.tasks, about["data"], strict=True):  # order I: one data set per task, as listed
        assert part["first_row"] <= int(task.rows.min())
        assert int(task.rows.max()) < part["first_row"] + part["num_train"]


def test_bad_files_are_told(tmp_path: Path) -> None:
    scenario, tables = build_on_layout("split-digits")
    path = export_parquet(scenario, tmp_path / "x.parquet", tables)
    with pytest.raises(InputError, match=r"needs their label tables, not those of none"):
        export_parquet(scenario, path, [])
    with pytest.raises(InputError, match="cannot read"):
        read_parquet(tmp_path / "nothing.parquet")
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(InputError, match="cannot read"):
        read_parquet(tmp_path / "text.parquet")
    table = pq.read_table(path)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match="is no exported scenario"):
        read_parquet(tmp_path / "other.parquet")
    for changed in (table.slice(1), table.drop_columns(["target"]), table.sort_by([("row", "descending")])):
        pq.write_table(changed, tmp_path / "changed.parquet")
        with pytest.raises(InputError, match="does not hold the table"):
            read_parquet(tmp_path / "changed.parquet")
    later = json.loads(table.schema.metadata[b"clbench"]) | {"format": 2}
    pq.write_table(table.replace_schema_metadata({b"clbench": json.dumps(later)}), tmp_path / "later.parquet")
    with pytest.raises(InputError, match="update clbench"):
        read_parquet(tmp_path / "later.parquet")


def test_an_older_file_stays_if_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, tables = build_on_layout("split-digits")
    path = export_parquet(scenario, tmp_path / "x.parquet", tables)
    before = path.read_bytes()

    def fail(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(Exception, match="the disk is full"):
        export_parquet(scenario, path, tables)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
