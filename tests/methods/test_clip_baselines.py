"""The other rows of the MTIL table: what each keeps, what it must be equal to, kills."""

import dataclasses
from typing import Any

import pytest
import torch
from tiny import EVERY_STEP, assert_survives_kill, run
from tiny_clip import PROMPTS, clip_learner, prompted, tiny_clip, weights_of

from clbench.evaluator import Schedule
from clbench.learner.hostreads import forbid_host_reads
from clbench.methods.continualft import ContinualFT
from clbench.methods.icarl import ICaRL, memory_shares
from clbench.methods.lwf import LwF
from clbench.methods.lwfvr import LwFVR
from clbench.methods.wiseft import WiSEFT
from clbench.methods.zeroshot import ZeroShot
from clbench.stream import Cursor

SILENT = Schedule(0)
ALL = [ZeroShot, ContinualFT, LwF, LwFVR, WiSEFT, ICaRL]
SMALL = {"capacity": 10, "reference_batch": 4, "sentences": 6, "words": 3}


@pytest.mark.parametrize("method", ALL)
def test_survives_kills(method: type) -> None:
    def make(**arguments: Any) -> Any:
        return clip_learner(method, schedule=EVERY_STEP, **SMALL, **arguments)

    assert_survives_kill(make, at_most=4)


@pytest.mark.parametrize("method", ALL)
def test_no_host_reads(method: type) -> None:
    learner = clip_learner(method, schedule=EVERY_STEP, iterations=1, **SMALL)
    learner.guard = forbid_host_reads
    run(learner)


def opened(method: type, task: int, **changes: Any) -> Any:
    """A learner inside the training phase of a task, before its first step, and that step's batch."""
    learner = clip_learner(method, schedule=SILENT, **{**SMALL, **changes})
    for _ in learner.steps() if task else ():
        if learner.at.task >= task:
            break
    learner.method.backbone.zero_grad()
    at = Cursor(task, 0, 0, 0, learner.at.step)
    plan = learner.plans()[task][0]
    if task == 0:
        learner.method.begin_phase(learner.scenario.tasks[0], plan.phase, at)
        learner.method.open_phase(learner.scenario.tasks[0], plan.phase, at)
    return learner, learner.stream.batch(plan, at)


# -- zero-shot and fine-tuning ---------------------------------------------------------------------------------------
def test_zero_shot_never_changes() -> None:
    learner = clip_learner(ZeroShot, scenario=prompted(3), schedule=SILENT)
    before = weights_of(learner)
    run(learner)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(learner), strict=True))
    assert all(torch.equal(hits, learner.matrix[0][1]) for _, hits in learner.matrix), "the same row behind every task"


def test_training_reads_the_first_prompt_and_answers_read_all() -> None:
    alike = dict.fromkeys(range(2), PROMPTS[:1])
    other = dict.fromkeys(range(2), (PROMPTS[0], "a class of the {}."))
    runs = {
        name: run(clip_learner(ContinualFT, scenario=prompted(prompts=prompts), schedule=SILENT))
        for name, prompts in (("one", alike), ("two", dict.fromkeys(range(2), PROMPTS)), ("other", other))
    }
    for name in ("two", "other"):
        pairs = zip(weights_of(runs["one"]), weights_of(runs[name]), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), "only the first prompt is trained on"
    texts = {name: made.method.classifier(0) for name, made in runs.items()}
    assert not torch.allclose(texts["one"], texts["two"])
    assert not torch.allclose(texts["two"], texts["other"])


def test_the_classifier_follows_the_weights() -> None:
    learner, _ = opened(ContinualFT, 0)
    method = learner.method
    first = method.classifier(0).clone()
    assert method.classifier(0) is method.classifier(0), "kept while nothing moves"
    for _ in learner.steps():
        break
    assert not torch.equal(method.classifier(0), first)
    classes = learner.scenario.tasks[0].classes
    others = [c for c in range(6) if c not in classes.tolist()]
    assert torch.all(method.classifier(0)[others] == 0), "an answer comes from the classes of the task"
    assert method.head(0).scale == tiny_clip().scale


def test_fast_tasks_have_a_rate_of_their_own() -> None:
    scenario = prompted()
    named = tuple(task._replace(name=name) for task, name in zip(scenario.tasks, ("mnist", "dtd"), strict=True))
    learner = clip_learner(
        ContinualFT, scenario=dataclasses.replace(scenario, tasks=named), fast_lr=0.5, lr=0.25, fast_tasks=("mnist",)
    )
    rates = []
    for index, task in enumerate(named):
        plan = learner.plans()[index][0]
        learner.method.open_phase(task, plan.phase, Cursor(index, 0, 0, 0, 0))
        rates.append(learner.method._rate)
    assert rates == [0.5, 0.25]


# -- WiSE-FT ---------------------------------------------------------------------------------------------------------
def test_wise_ft_with_all_is_fine_tuning_and_with_nothing_zero_shot() -> None:
    """mtil card, section 7."""
    fine_tuned = run(clip_learner(ContinualFT, schedule=SILENT))
    start = weights_of(clip_learner(ContinualFT))
    whole, none = (run(clip_learner(WiSEFT, alpha=alpha, schedule=SILENT)) for alpha in (1.0, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(weights_of(fine_tuned), weights_of(whole), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(start, weights_of(none), strict=True))


def test_wise_ft_merges_behind_each_task() -> None:
    merged, _ = opened(WiSEFT, 1, alpha=0.8)
    start = [p.detach() for p in tiny_clip().trainable()]
    # the chain's second task has taken one step; what it began from is kept by WiSE-FT
    plain = clip_learner(ContinualFT, schedule=SILENT)
    for _ in plain.steps():
        if plain.at.task == 0 and plain.at.iteration == 5:
            break
    trained = [p.detach() for p in plain.method.backbone.trainable()]
    for found, a, b in zip(merged.method.start, trained, start, strict=True):
        torch.testing.assert_close(found, 0.8 * a + 0.2 * b, rtol=1e-5, atol=1e-7)


# -- LwF and LwF-VR --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [LwF, LwFVR])
@pytest.mark.parametrize("task", [0, 1])
def test_lwf_begins_every_task_without_gradient(method: type, task: int) -> None:
    """mtil card, section 7: the teacher is the model as the task began."""
    learner, batch = opened(method, task)
    student = learner.method
    if task:
        student.teacher.follow(student.backbone)  # one step of the task has been taken
        student.teacher_texts = student.teacher.texts(student.reference_tokens(task))
    terms = student.losses(batch)
    (terms["image"] + terms["text"]).backward()
    size = max(p.grad.abs().max().item() for p in student.backbone.image_parameters() if p.grad is not None)
    assert terms["image"].item() > 0.1
    assert size < 1e-5
    assert all(p.grad is None for p in student.backbone.text_parameters())


def test_the_teacher_of_lwf_is_the_network_of_the_task_before() -> None:
    learner, _ = opened(LwF, 1)
    teacher = list(learner.method.teacher.network.parameters())
    first = list(tiny_clip().parameters())
    assert any(not torch.equal(a, b) for a, b in zip(teacher, first, strict=True))
    assert len(learner.method.teacher_texts) == 3, "the prompts of the task's three classes"


def test_random_sentences_differ_by_task_and_seed_only() -> None:
    tokens = {(seed, task): opened(LwFVR, 0)[0].method.reference_tokens(task) for seed in (0, 0) for task in (0, 1)}
    assert not torch.equal(tokens[0, 0], tokens[0, 1])
    backbone = tiny_clip()
    assert tokens[0, 0].shape[0] == 6
    assert (tokens[0, 0] == backbone.tokenizer.end).sum() == 6, "one end mark each"
    assert (tokens[0, 0].argmax(1) == 4).all(), "behind the start and three words"
    assert torch.equal(tokens[0, 0], opened(LwFVR, 0)[0].method.reference_tokens(0))


# -- iCaRL -----------------------------------------------------------------------------------------------------------
def test_shares_of_the_memory() -> None:
    assert memory_shares(10_000, 1, "official") == (10_000, 10_000)
    assert memory_shares(10_000, 2, "official") == (5_000, 5_000)
    assert memory_shares(10_000, 4, "official") == (2_500, 7_500), "more than 10,000 in all (card, 6.2)"
    assert memory_shares(10_000, 4, "equal") == (2_500, 2_500)


def test_memory_of_icarl() -> None:
    scenario = prompted(3)
    learner = run(clip_learner(ICaRL, scenario=scenario, schedule=SILENT, capacity=9))
    rows = learner.method.exemplars
    assert [len(part) for part in rows] == [3, 3, 6]
    assert rows[0].tolist() == scenario.tasks[0].rows[:3].tolist(), "the first data set gives its first images"
    for part, task in zip(rows, scenario.tasks, strict=True):
        assert set(part.tolist()) <= set(task.rows.tolist())
        assert len(set(part.tolist())) == len(part)
    assert learner.method.memory_bytes()["exemplars"] == 12 * 36


def test_icarl_distils_from_the_second_task_on() -> None:
    learner = run(clip_learner(ICaRL, schedule=SILENT, **SMALL))
    names = learner.losses.names
    steps, ids, _ = learner.losses.table()
    first = {names[i] for step, i in zip(steps, ids, strict=True) if step <= 5}
    later = {names[i] for step, i in zip(steps, ids, strict=True) if step > 5}
    assert first == {"loss"}
    assert later == {"loss", "ce", "image", "text"}


@pytest.mark.parametrize(("teacher", "same"), [("initial", True), ("previous", False)])
def test_teacher_of_icarl(teacher: str, same: bool) -> None:
    learner = run(clip_learner(ICaRL, schedule=SILENT, teacher=teacher, **SMALL))
    pairs = zip(learner.method.teacher.network.parameters(), tiny_clip().parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) == same


def test_exemplars_are_cycled_in_a_fixed_order() -> None:
    learner, _ = opened(ICaRL, 1, capacity=7, reference_batch=3)
    method = learner.method
    drawn = torch.cat([method._next_exemplars(Cursor(1, 0, i, 0, 0)) for i in range(7)])
    expected = torch.cat(method.exemplars).repeat(3)
    assert torch.equal(drawn, expected)
