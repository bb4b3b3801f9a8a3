"""Tune, freeze, evaluate: the whole protocol in one process, on digits."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from studies import LR, TINY, plan, records, same

from clbench.errors import InputError, RunFailed
from clbench.protocol import jobs as jobs_module
from clbench.protocol.analysis import spent
from clbench.protocol.engines import InProcess
from clbench.protocol.evaluation import evaluate, load_evaluation
from clbench.protocol.search import SearchPlan
from clbench.protocol.signed import read_signed, signature, write_signed
from clbench.protocol.space import Dimension
from clbench.protocol.study import load_study, prepare, tune
from clbench.protocol.two_phase import Target, run_protocol, write_report
from clbench.protocol.verify import against_records
from clbench.scenarios import registry
from clbench.store import RunRecord

WHERE: dict[str, Any] = {"device": "cpu", "threads": 1, "data": []}

NOISE = '''"""Digits 5-9 with labels that are noise (or not)."""
from dataclasses import dataclass, replace
import torch
from clbench.scenarios import class_half, class_incremental
from clbench.scenarios.params import param

DATASETS = ("digits",)

@dataclass(frozen=True)
class Params(class_half.Params):
    noise: bool = param(False, "whether targets are drawn")

def build(tables, seed, params, *, id, defaults):
    made = class_half.build(tables, seed, params, id=id, defaults=defaults)
    if not params.noise:
        return made
    rng = torch.Generator().manual_seed(seed)
    def drawn(targets, classes):
        return classes[torch.randint(len(classes), (len(targets),), generator=rng)]
    tasks = tuple(t._replace(targets=drawn(t.targets, t.classes)) for t in made.tasks)
    groups = tuple(g._replace(targets=drawn(g.targets, t.classes)) for g, t in zip(made.groups, made.tasks))
    return replace(made, tasks=tasks, groups=groups)
'''


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that several tests look at; none changes it."""
    prepared = prepare(plan(tmp_path_factory.mktemp("studies")))
    tune(prepared, InProcess())
    return prepared.file


# -- tuning ----------------------------------------------------------------------------------------------------------
def test_a_study_says_all_that_decides_it(frozen: Path) -> None:
    study = load_study(frozen)
    assert study["method"] == {"id": "finetune", "file_sha256": None}
    assert study["tuned_on"]["score_on"] == "validation"
    assert set(study["tuned_on"]["fingerprints"]) == {"0", "1"}
    assert study["space"].keys() == {"lr", "batch_size"}  # what --set and --epochs fix is not searched
    assert len(study["trials"]) == 3
    for trial in study["trials"]:
        assert trial["status"] == "done"
        assert trial["score"] == pytest.approx(sum(trial["scores"].values()) / 2)
    assert study["best"]["score"] == max(trial["score"] for trial in study["trials"])
    assert study["best"]["frozen"]["hyperparameters"]["lr"]["value"] == study["best"]["values"]["lr"]
    assert study["best"]["frozen"]["options"]["batch_size"]["value"] == study["best"]["values"]["batch_size"]
    assert len(study["code"]) == 1
    assert study["signature"] == signature(study)
    assert against_records(frozen, study) == []


def test_trials_are_scored_on_validation_rows_and_say_so(frozen: Path) -> None:
    for folder in records(frozen.parent / "trials"):
        spec = RunRecord(folder).read_spec()
        assert spec.scenario_params["score"] == "validation"
        assert spec.hyperparameters["lr"].source == "search on split-digits-a@1"
        assert spec.sources["batch_size"] == "search on split-digits-a@1"
        assert spec.hyperparameters["momentum"].source.startswith("default")
        assert RunRecord(folder).read_matrix().sizes.sum() == 10  # 2 of each of 5 classes


def test_a_rerun_gives_the_same_file_and_runs_nothing_again(frozen: Path, tmp_path: Path) -> None:
    elsewhere = prepare(plan(tmp_path))
    tune(elsewhere, InProcess())
    assert same(elsewhere.file.read_bytes(), frozen.read_bytes())
    elsewhere.file.unlink()
    starts = {path: path.read_bytes() for path in tmp_path.rglob("env.json")}
    tune(prepare(plan(tmp_path)), InProcess())
    assert same(elsewhere.file.read_bytes(), frozen.read_bytes())
    assert {path: path.read_bytes() for path in tmp_path.rglob("env.json")} == starts


def test_the_official_choice_is_named(tmp_path: Path) -> None:
    test = prepare(plan(tmp_path, score_on="test", seeds=(0,), search=SearchPlan("uniform", 1)))
    study = tune(test, InProcess())
    assert study["tuned_on"]["score_on"] == "test"
    results = run_protocol([test.plan], Target("split-digits-b", (0,), TINY), InProcess())
    text = write_report(results, tmp_path / "report").read_text()
    assert "TEST rows" in text
    source = spec_of(results[0].folder / "evaluation").hyperparameters["lr"].source
    assert "scored on its test rows" in source


@pytest.mark.parametrize("kind", ["tpe", "halving"])  # those that look at scores
def test_a_search_gives_the_same_study_again(tmp_path: Path, kind: Any) -> None:
    search = SearchPlan(kind, 4, batch=2, first_tasks=1)
    found = []
    for name in "ab":
        prepared = prepare(plan(tmp_path / name, search=search))
        study = tune(prepared, InProcess())
        assert against_records(prepared.file, study) == []
        found.append(prepared.file.read_bytes())
    assert same(found[0], found[1])
    if kind == "halving":
        rungs = [len(trial.get("earlier", [])) for trial in study["trials"]]
        assert sorted(rungs) == [0, 0, 1, 2]  # 4 trials, 2 go on, 1 ends with all seeds
        assert len(study["trials"][study["best"]["trial"]]["scores"]) == 2


def test_a_score_may_be_one_where_less_is_better(tmp_path: Path) -> None:
    study = tune(prepare(plan(tmp_path, score="forgetting")), InProcess())
    assert study["best"]["score"] == min(trial["score"] for trial in study["trials"])


# -- isolation -------------------------------------------------------------------------------------------------------
def test_noise_in_place_of_the_evaluation_labels_changes_nothing(tmp_path: Path) -> None:
    """The poison test (card, section 6)."""
    (tmp_path / "other.py").write_text(NOISE)
    found = []
    for noise in (False, True):
        target = Target(str(tmp_path / "other.py"), (0,), {**TINY, "half": "second", "increment": 2, "noise": noise})
        result = run_protocol([plan(tmp_path / str(noise))], target, InProcess())[0]
        assert result.evaluation is not None
        found.append((result.study, result.evaluation))
    (clean, good), (poisoned, bad) = found
    assert clean["trials"] == poisoned["trials"]
    assert clean["best"] == poisoned["best"]
    assert good["evaluated_on"]["fingerprints"] != bad["evaluated_on"]["fingerprints"]


def test_while_tuning_the_evaluation_scenario_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    build, run_job = registry.build, jobs_module.attempt

    def watched(preset: Any, tables: Any, seed: int) -> Any:
        events.append(preset.id)
        return build(preset, tables, seed)

    def attempt(job: Any) -> Any:
        events.append("evaluate" if "tuned on" in str(job.sources) else "trial")
        return run_job(job)

    monkeypatch.setattr("clbench.scenarios.build", watched)
    monkeypatch.setattr("clbench.protocol.jobs.attempt", attempt)
    run_protocol([plan(tmp_path)], Target("split-digits-b", (0,), TINY), InProcess())
    tuning = events[events.index("trial") : len(events) - events[::-1].index("trial")]
    assert tuning.count("trial") == 6
    assert set(tuning) == {"trial", "split-digits-a@1"}
    assert "split-digits-b@1" in events[len(tuning) :]


def spec_of(folder: Path) -> Any:
    return RunRecord(records(folder)[0]).read_spec()


def test_tuned_on_comes_from_a_study_alone(frozen: Path, tmp_path: Path) -> None:
    content = evaluate(frozen, "split-digits-b", InProcess(), seeds=(0, 1), params=TINY, where=WHERE)
    assert content["in_scenario"] is False
    study = load_study(frozen)
    for folder in records(frozen.parent / "evaluation"):
        spec = RunRecord(folder).read_spec()
        mark = f"tuned on split-digits-a@1 (study {study['signature'][:12]})"
        assert spec.hyperparameters["lr"].source == mark
        assert spec.hyperparameters["lr"].value == study["best"]["values"]["lr"]
        assert spec.sources["batch_size"] == mark
        assert spec.hyperparameters["weight_decay"].source == "--set"
        assert spec.hyperparameters["momentum"].source.startswith("default")
        assert spec.sources["backbone"].startswith("default")
        assert "score" not in spec.scenario_params
        assert spec.epochs == 1
    file = next((frozen.parent / "evaluation").glob("*.json"))
    assert load_evaluation(file) == content
    assert against_records(file, content) == []
    assert spent(frozen.parent, study, content)["evaluation"]["runs"] == 2
    assert spent(frozen.parent, study)["tuning"]["runs"] == 6


def test_a_changed_study_is_refused(frozen: Path, tmp_path: Path) -> None:
    text = frozen.read_text()
    forged = tmp_path / "study.json"
    content = json.loads(text)
    content["best"]["values"]["lr"] = 0.123
    forged.write_text(json.dumps(content))
    with pytest.raises(InputError, match="has been changed"):
        evaluate(forged, "split-digits-b", InProcess(), seeds=(0,), params=TINY, where=WHERE)
    for broken, problem in (("{", "not JSON"), ("[1]", "no study file"), ('{"kind": "run"}', "no study file")):
        forged.write_text(broken)
        with pytest.raises(InputError, match=problem):
            load_study(forged)
    with pytest.raises(InputError, match="there is no file"):
        load_study(tmp_path / "nowhere.json")


def test_a_study_signed_anew_is_found_out_by_its_records(frozen: Path, tmp_path: Path) -> None:
    content = json.loads(frozen.read_text())
    content["trials"][0]["scores"]["0"] = 1.0
    content["trials"][1]["values"]["lr"] = 0.2
    forged = write_signed(tmp_path / "study.json", content)
    problems = against_records(frozen, forged)
    assert any("the file says 1.0" in text for text in problems)
    assert any("lr=" in text and "not 0.2" in text for text in problems)


@pytest.mark.parametrize(
    ("key", "value"), [("data_fingerprints", ["0" * 64]), ("fingerprints", {"0": "ab", "1": "cd"}), ("num_tasks", 4)]
)
def test_a_study_of_other_data_or_tables_is_refused(frozen: Path, tmp_path: Path, key: str, value: Any) -> None:
    content = json.loads(frozen.read_text())
    content["tuned_on"][key] = value
    write_signed(tmp_path / "study.json", content)
    with pytest.raises(InputError, match=f"other {key.replace('_', ' ')}"):
        evaluate(tmp_path / "study.json", "split-digits-b", InProcess(), seeds=(0,), params=TINY, where=WHERE)


def test_a_study_of_another_method_file_or_other_weights_is_refused(frozen: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another method"):
        evaluate(frozen, "split-digits-b", InProcess(), seeds=(0,), params=TINY, where=WHERE, method="er")
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(InputError, match="other --weights"):
        evaluate(
            frozen, "split-digits-b", InProcess(), params=TINY, where={**WHERE, "weights": tmp_path / "weights.pt"}
        )


def test_overlap_is_refused_or_marked_everywhere(frozen: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="share classes"):
        evaluate(frozen, "split-digits", InProcess(), seeds=(0,), params=TINY, where=WHERE)
    with pytest.raises(InputError, match="share classes"):
        run_protocol([plan(tmp_path)], Target("split-digits-a", (0,), TINY), InProcess())
    assert not records(tmp_path), "an overlap must be found before anything runs"
    target = Target("split-digits-a", (0,), TINY, in_scenario=True)
    result = run_protocol([plan(tmp_path)], target, InProcess())[0]
    assert result.evaluation is not None
    assert result.evaluation["in_scenario"] is True
    assert "in-scenario" in spec_of(result.folder / "evaluation").hyperparameters["lr"].source
    text = write_report([result], tmp_path / "report").read_text()
    assert "IN-SCENARIO" in text
    assert "(in-scenario)" in text


def test_the_conventional_protocol_stands_beside(tmp_path: Path) -> None:
    target = Target("split-digits-b", (0, 1), TINY)
    result = run_protocol([plan(tmp_path)], target, InProcess(), conventional=True)[0]
    assert result.conventional is not None
    study, evaluation = result.conventional
    assert study["tuned_on"]["scenario"] == "split-digits-b@1"
    assert study["tuned_on"]["score_on"] == "test"
    assert evaluation["in_scenario"] is True
    assert [t["values"] for t in study["trials"]] == [t["values"] for t in result.study["trials"]]
    # tuned on these very rows and seeds, so no other trial can do better there
    assert study["best"]["score"] >= sum(run["metrics"]["final_accuracy"] for run in result.evaluation["runs"]) / 2  # type: ignore[index]
    text = write_report([result], tmp_path / "report").read_text()
    assert "| conventional | overestimate |" in text


# -- what can go wrong -----------------------------------------------------------------------------------------------
def test_a_trial_that_diverges_is_a_failed_trial(tmp_path: Path) -> None:
    wild = plan(
        tmp_path, overrides=(Dimension("lr", choices=(0.01, 10.0)),), search=SearchPlan("uniform", 4),
        fixed={"epochs": 3, "batch_size": 5, "set": {"weight_decay": "1.0", "momentum": "0.99"}},
    )  # fmt: skip
    study = tune(prepare(wild), InProcess())
    states = {trial["values"]["lr"]: (trial["status"], trial["reason"]) for trial in study["trials"]}
    assert states[0.01] == ("done", "")
    assert states[10.0][0] == "failed"
    assert "became" in states[10.0][1]
    assert study["best"]["values"]["lr"] == 0.01


def test_if_all_trials_fail_nothing_is_frozen(tmp_path: Path) -> None:
    wild = plan(
        tmp_path, overrides=(Dimension("lr", choices=(10.0,)),), search=SearchPlan("uniform", 2), seeds=(0,),
        fixed={"epochs": 3, "batch_size": 5, "set": {"weight_decay": "1.0", "momentum": "0.99"}},
    )  # fmt: skip
    prepared = prepare(wild)
    with pytest.raises(RunFailed, match=r"all 2 trials of finetune on split-digits-a@1 failed.*became"):
        tune(prepared, InProcess())
    assert not prepared.file.exists()


def test_a_full_disk_stops_the_study_and_loses_nothing(
    frozen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clbench import atomic

    real, count = atomic.os.fsync, [0]

    def full(handle: int) -> None:
        count[0] += 1
        if count[0] > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    prepared = prepare(plan(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", full)
        with pytest.raises(RunFailed, match="disk is full"):
            tune(prepared, InProcess())
    assert 0 < len(records(tmp_path)) < 6, "the disk must have been full in the middle"
    assert not prepared.file.exists()
    tune(prepare(plan(tmp_path)), InProcess())
    assert same(prepared.file.read_bytes(), frozen.read_bytes())


def test_a_record_that_has_gone_is_run_again(frozen: Path, tmp_path: Path) -> None:
    import shutil

    prepared = prepare(plan(tmp_path))
    tune(prepared, InProcess())
    shutil.rmtree(records(tmp_path)[0])
    prepared.file.unlink()
    tune(prepare(plan(tmp_path)), InProcess())
    assert same(prepared.file.read_bytes(), frozen.read_bytes())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"method": "nmc"}, "declares no search space.*--untuned"),
        ({"method": "no-such"}, "unknown method"),
        ({"scenario": "no-such"}, "unknown scenario"),
        ({"score": "accuracy"}, "accuracy"),
        ({"seeds": ()}, "--tune-seeds"),
        ({"overrides": (Dimension("speed", choices=(1,)),)}, "speed"),
        ({"overrides": (Dimension("lr", low=0.1, high=100.0),)}, "between 0.0 and 10.0"),
        ({"overrides": (Dimension("batch_size", choices=(0.5,)),)}, "whole number"),
        ({"fixed": {"batch_size": 0}}, "--batch-size is 0"),
        ({"params": {"per_class": 1}}, "val_share"),
        ({"scenario": "online-split-cifar10", "params": {}}, "cifar10"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_runs(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        tune(prepare(plan(tmp_path, **changes)), InProcess())
    assert not records(tmp_path)


def test_a_method_without_a_space_can_be_taken_as_it_is(tmp_path: Path) -> None:
    prepared = prepare(plan(tmp_path, method="nmc", untuned=True, fixed={}))
    study = tune(prepared, InProcess())
    assert len(study["trials"]) == 1
    assert study["space"] == {}
    result = run_protocol([prepared.plan], Target("split-digits-b", (0,), TINY), InProcess())[0]
    assert "prototype" in spec_of(result.folder / "evaluation").hyperparameters
    write_report([result], tmp_path / "report")


def test_a_space_given_by_hand_replaces_the_declared_one(tmp_path: Path) -> None:
    prepared = prepare(
        plan(tmp_path, overrides=(replace(LR, low=0.01, high=0.02), Dimension("momentum", choices=(0.9,))))
    )
    described = prepared.space.describe()
    assert described["lr"]["low"] == 0.01
    assert described["momentum"]["choices"] == [0.9]


def test_signatures_ignore_the_order_of_keys(tmp_path: Path) -> None:
    written = write_signed(tmp_path / "a.json", {"kind": "study", "b": 1, "a": [0.1]})
    assert written["signature"] == signature({"a": [0.1], "b": 1, "kind": "study"})
    assert read_signed(tmp_path / "a.json", "study") == written
