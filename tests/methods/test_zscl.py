"""ZSCL against the vectors of its card, the card's invariants, the cached teacher, kills, and bad input."""

import copy
import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import EVERY_STEP, assert_survives_kill, run
from tiny_clip import clip_learner, prompted, reference_set, tiny_clip, weights_of
from torch import Tensor

from clbench.errors import InputError
from clbench.evaluator import Schedule
from clbench.learner.hostreads import forbid_host_reads
from clbench.methods._clip import interpolate, task_loss, warmup_cosine
from clbench.methods._distillation import distillation_losses, image_image_loss, similarity, soft_cross_entropy
from clbench.methods.continualft import ContinualFT
from clbench.methods.zscl import ZSCL, consolidation_loss, merge
from clbench.scenarios.model import Task
from clbench.stream import Cursor, Phase

VECTORS = json.loads((Path(__file__).parent / "fixtures" / "zscl.json").read_text())
SILENT = Schedule(0)


def double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def near(value: float, **tolerance: float) -> Any:
    return pytest.approx(value, rel=1e-12, **{"abs": 1e-15, **tolerance})


# -- vectors ---------------------------------------------------------------------------------------------------------
def test_every_vector_is_used() -> None:
    """A vector that is added must be looked at."""
    assert set(VECTORS) - {"_meta"} == {
        "distillation_raw", "feature_distillation_scale10", "task_ce", "weight_ensemble", "weight_ensemble_linear_toy",
        "moving_avg", "lr_schedule_mtil", "lr_schedule_cil", "ablation_image_image",
    }  # fmt: skip


def test_soft_cross_entropy() -> None:
    case = VECTORS["distillation_raw"]
    teacher, student = double(case["t"]), double(case["s"])
    expected = case["expected"]
    for temperature in (1, 2):
        found = soft_cross_entropy(teacher, student, temperature).item()
        assert found == near(expected[f"T={temperature}"])
    assert soft_cross_entropy(teacher, teacher, 2).item() == near(expected["T=2,s=t (not zero!)"])
    assert soft_cross_entropy(student, teacher, 2).item() != pytest.approx(expected["T=2"], rel=1e-3), "order matters"


def test_distillation_losses_and_their_gradient() -> None:
    case = VECTORS["feature_distillation_scale10"]
    expected, scale = case["expected"], case["logit_scale_exp"]
    student = double(case["student_image"]).requires_grad_()
    teacher, texts = double(case["teacher_image"]), double(case["teacher_text"])
    torch.testing.assert_close(similarity(student, texts, scale), double(expected["logits_student"]))
    torch.testing.assert_close(similarity(teacher, texts, scale), double(expected["logits_teacher"]))
    image, text = distillation_losses(student, teacher, texts, scale, case["T"])
    assert (image.item(), text.item()) == (near(expected["image_loss"]), near(expected["text_loss"]))
    assert (image + text).item() == near(expected["sum_mtil"])
    assert (5 * image + 5 * text).item() == near(expected["cil_weighted_5_5"])
    (image + text).backward()
    torch.testing.assert_close(student.grad, double(expected["grad_student_image"]), rtol=1e-12, atol=1e-12)


def test_image_image_loss() -> None:
    case = VECTORS["feature_distillation_scale10"]
    found = image_image_loss(double(case["student_image"]), double(case["teacher_image"]), 10.0, 2)
    assert found.item() == near(VECTORS["ablation_image_image"]["expected"])


def test_task_loss() -> None:
    case = VECTORS["task_ce"]
    image, text, labels = double(case["image"]), double(case["class_text"]), torch.tensor(case["labels"])
    torch.testing.assert_close(similarity(image, text, 100.0), double(case["expected"]["logits"]))
    assert task_loss(image, text, labels, 100.0, 0.2).item() == near(case["expected"]["ce_ls0.2"])
    assert task_loss(image, text, labels, 100.0, 0.0).item() == near(case["expected"]["ce_ls0"])


def test_weight_ensemble() -> None:
    case = VECTORS["weight_ensemble"]
    mean = [double(case["init"])]
    snapshots = zip(case["snapshots"], case["expected_after_each"], strict=True)
    for members, (weights, expected) in enumerate(snapshots, start=1):
        merge(mean, [double(weights)], members)
        torch.testing.assert_close(mean[0], double(expected))
    torch.testing.assert_close(mean[0], double(case["closed_form_final"]))


def test_weight_ensemble_of_a_line() -> None:
    mean, members = [double([0.0])], 1
    for step in range(1001):
        if step % 100 == 0:
            merge(mean, [double([step + 1.0])], members)
            members += 1
    assert members == 12
    assert mean[0].item() == near(VECTORS["weight_ensemble_linear_toy"]["expected"])


def test_moving_average() -> None:
    case = VECTORS["moving_avg"]
    weights = [double(case["model"])]
    interpolate(weights, [double(case["we"])], case["alpha"])
    torch.testing.assert_close(weights[0], double(case["expected_model"]), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("name", "lr", "warmup", "total"), [("mtil", 1e-5, 100, 1000), ("cil", 7.1e-6, 30, 79)])
def test_schedules(name: str, lr: float, warmup: int, total: int) -> None:
    for step, expected in VECTORS[f"lr_schedule_{name}"]["expected"].items():
        assert warmup_cosine(lr, int(step), warmup, total) == near(expected, abs=1e-20)
    assert warmup_cosine(lr, 0, warmup, total) == near(lr / warmup)


def test_tiny_tasks_never_leave_the_warm_up() -> None:
    """CIL with 50 steps: 16 iterations and one more, warm-up 30 (card, 6.8)."""
    rates = [warmup_cosine(7.1e-6, step, 30, 16) for step in range(17)]
    assert max(rates) == near(7.1e-6 * 17 / 30)


# -- invariants of the losses (card, section 7) ----------------------------------------------------------------------
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(2, 6))
def test_invariants_of_the_distillation(seed: int, images: int, texts: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn((images, 5), generator=rng, dtype=torch.float64) for _ in range(2))
    words = torch.randn((texts, 5), generator=rng, dtype=torch.float64)
    image, text = distillation_losses(student, teacher, words, 10.0, 2.0)
    order = torch.randperm(texts, generator=rng)
    permuted, _ = distillation_losses(student, teacher, words[order], 10.0, 2.0)
    assert permuted.item() == pytest.approx(image.item(), rel=1e-9), "the order of texts is nothing to L_img"
    twice_image, twice_text = distillation_losses(student, teacher, words.repeat(2, 1), 10.0, 2.0)
    assert twice_text.item() == pytest.approx(text.item(), rel=1e-9)
    assert twice_image.item() == pytest.approx(image.item() + 4 * math.log(2), rel=1e-9)
    assert image.item() >= soft_cross_entropy(*[similarity(teacher, words, 10.0)] * 2, 2.0).item() - 1e-9, "entropy"


def test_one_snapshot_gives_the_midpoint() -> None:
    mean = [double([2.0])]
    merge(mean, [double([4.0])], 1)
    assert mean[0].item() == 3.0


def test_consolidation_is_a_plain_sum() -> None:
    now, before = [double([1.0, 2.0]), double([[3.0]])], [double([0.0, 0.0]), double([[1.0]])]
    assert consolidation_loss(now, before).item() == 9.0


# -- the method ------------------------------------------------------------------------------------------------------
def opened(**changes: Any) -> Any:
    """A learner inside its first training phase, before any step."""
    learner = clip_learner(ZSCL, **changes)
    task, plan = learner.scenario.tasks[0], learner.plans()[0][0]
    learner.method.begin_phase(task, plan.phase, learner.at)
    learner.method.open_phase(task, plan.phase, learner.at)
    return learner, learner.stream.batch(plan, learner.at)


def test_at_the_start_the_distillation_has_value_but_no_gradient() -> None:
    learner, batch = opened(teacher="live")
    method = learner.method
    terms = method.losses(batch)
    (terms["image"] + terms["text"]).backward()
    assert terms["image"].item() > 0
    assert terms["text"].item() > 0
    size = max(p.grad.abs().max().item() for p in method.backbone.image_parameters() if p.grad is not None)
    assert size < 1e-5, "student and teacher agree"
    method.backbone.zero_grad()
    assert method.adjust_gradients()["wc"].item() == 0


def test_no_distillation_reaches_the_text_tower() -> None:
    learner, batch = opened()
    method = learner.method
    with torch.no_grad():
        for parameter in method.backbone.trainable():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.05)
    terms = method.losses(batch)
    (terms["image"] + terms["text"]).backward()
    assert all(p.grad is None for p in method.backbone.text_parameters()), "exactly nothing"
    assert max(p.grad.abs().max().item() for p in method.backbone.image_parameters() if p.grad is not None) > 1e-3


def test_the_anchor_gradient_is_that_of_its_loss() -> None:
    learner, _ = opened(consolidation=0.7)
    method = learner.method
    weights = method.backbone.trainable()
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.01)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    value = method.adjust_gradients()["wc"]
    found = [weight.grad.clone() - 1 for weight in weights]
    for weight in weights:
        weight.grad = None
    loss = 0.7 * consolidation_loss(weights, method.start)
    loss.backward()
    assert value.item() == pytest.approx(loss.item(), rel=1e-5)
    for by_hand, weight in zip(found, weights, strict=True):
        torch.testing.assert_close(by_hand, weight.grad, rtol=1e-4, atol=1e-6)


def test_the_average_is_saved_and_starts_the_next_task() -> None:
    """Members: the start, and the weights behind steps 0, 2 and 4. The live model of the end is another one."""
    seen: list[list[Tensor]] = []

    class Watched(ZSCL):
        def begin_phase(self, task: Task, phase: Phase, at: Cursor) -> None:
            super().begin_phase(task, phase, at)
            if at.task == 0:
                seen.append([w.detach().clone() for w in self.backbone.trainable()])

        def after_step(self, at: Cursor) -> None:
            super().after_step(at)
            if at.iteration % 2 == 0 and at.task == 0:
                seen.append([w.detach().clone() for w in self.backbone.trainable()])

    learner = clip_learner(Watched, average_every=2, schedule=SILENT)
    for _ in learner.steps():
        if learner.at.task == 1:  # behind the first step of the second task
            break
    assert len(seen) == 4
    expected = [torch.stack(parts).double().mean(0) for parts in zip(*seen, strict=True)]
    for found, wanted in zip(learner.method.start, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-7)
    last = seen[-1]
    assert any((found - w).abs().max() > 1e-5 for found, w in zip(learner.method.start, last, strict=True))


def test_deployed_weights_are_the_mean_while_a_task_runs() -> None:
    learner = clip_learner(ZSCL, average_every=1, lr=1e-2, schedule=SILENT)
    for _ in itertools.islice(learner.steps(), 3):
        pass
    method = learner.method
    live = [w.detach().clone() for w in method.backbone.trainable()]
    texts = method.classifier(0).clone()
    with method.deployed():
        for weight, mean in zip(method.backbone.trainable(), method.mean, strict=True):
            assert torch.equal(weight, mean)
        assert not torch.equal(method.classifier(0), texts), "texts are encoded by the deployed weights, too"
    assert all(torch.equal(a, b) for a, b in zip(live, method.backbone.trainable(), strict=True))
    assert torch.equal(method.classifier(0), texts)


def test_the_scale_of_logits_never_changes() -> None:
    learner = clip_learner(ZSCL, lr=1e-2, averaging="ensemble", schedule=SILENT)
    before = learner.method.backbone.log_scale.detach().clone()
    run(learner)
    assert torch.equal(learner.method.backbone.log_scale, before)


def test_last_step_has_rate_zero() -> None:
    learner = clip_learner(ZSCL, schedule=SILENT)
    rates = []
    for _ in itertools.takewhile(lambda _: learner.at.task == 0, learner.steps()):
        rates.append(learner.method.optimizer.param_groups[0]["lr"])
    assert rates == [pytest.approx(warmup_cosine(1e-3, step, 2, 4)) for step in range(5)]
    assert rates[-1] == 0


def test_cached_and_live_teacher_give_the_same_losses() -> None:
    """Of one step of a student that has moved (the issue's bound)."""
    values = {}
    for kind in ("cached", "live"):
        learner, batch = opened(teacher=kind, reference=reference_set(40, 30))
        with torch.no_grad():
            for parameter in learner.method.backbone.trainable():
                parameter.mul_(1.01)
        values[kind] = {name: term.item() for name, term in learner.method.losses(batch).items()}
    assert values["live"]["image"] > 1
    assert values["cached"] == {name: pytest.approx(value, rel=1e-6) for name, value in values["live"].items()}


def test_cached_and_live_runs_end_alike() -> None:
    losses = {}
    for kind in ("cached", "live"):
        learner = run(clip_learner(ZSCL, teacher=kind, schedule=SILENT))
        losses[kind] = learner.losses.table()[2]
    assert torch.from_numpy(losses["cached"]).allclose(torch.from_numpy(losses["live"]), rtol=1e-4, atol=1e-5)


def test_reference_batches_are_cycled_and_change_with_the_task() -> None:
    learner, _ = opened(reference=reference_set(12), reference_batch=4)
    cycle = learner.method._cycle
    drawn = [cycle.batch(12, 4, Cursor(0, 0, i, 0, i)) for i in range(6)]
    for start in (0, 3):
        assert sorted(torch.cat(drawn[start : start + 3]).tolist()) == list(range(12)), "a pass sees each image once"
    assert not torch.equal(torch.cat(drawn[:3]), torch.cat(drawn[3:])), "shuffled anew"
    assert not torch.equal(drawn[0], cycle.batch(12, 4, Cursor(1, 0, 0, 0, 9)))
    assert len(cycle.batch(3, 4, Cursor(0, 0, 5, 0, 5))) == 3, "fewer images than a batch: all of them"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"averaging": "pull", "teacher": "live", "average_every": 2},
        {"negatives": 3, "image_image_weight": 1.0, "feature_mse_weight": 1.0, "consolidation": 0.0},
        {"averaging": "none", "candidates": "seen"},
        {"image_weight": 0.0, "text_weight": 0.0},
    ],
)
def test_survives_kills(changes: dict[str, Any]) -> None:
    def make(**arguments: Any) -> Any:
        return clip_learner(ZSCL, **{"average_every": 2, **changes}, **arguments)

    assert_survives_kill(make, at_most=5)


def test_no_host_reads() -> None:
    learner = clip_learner(ZSCL, schedule=EVERY_STEP, negatives=2)
    learner.method.prepare()
    learner.guard = forbid_host_reads
    run(learner)


def test_without_its_parts_it_is_continual_fine_tuning() -> None:
    plain = run(clip_learner(ContinualFT, schedule=SILENT))
    bare = run(
        clip_learner(ZSCL, image_weight=0.0, text_weight=0.0, consolidation=0.0, averaging="none", schedule=SILENT)
    )
    assert all(torch.equal(a, b) for a, b in zip(weights_of(plain), weights_of(bare), strict=True))


def test_class_incremental_variant() -> None:
    """CIL: one pass of ceil(n / B) + 1 steps, one prompt, answers over all classes seen."""
    scenario = prompted(3, setting="class", prompts={})
    learner = clip_learner(
        ZSCL, scenario=scenario, iterations=0, prompt="a bad photo of a {}.", image_weight=5.0, text_weight=5.0,
        average_every=10, consolidation=0.0, negatives=2, schedule=EVERY_STEP,
    )  # fmt: skip
    per_task = math.ceil(len(scenario.tasks[0].rows) / 5) * 2  # two epochs in this scenario
    assert learner.total_steps() == 3 * (per_task + 1)
    run(learner)
    assert learner.method.classifier(None).shape == (6, 16)
    prompts = learner.method._prompts.texts if hasattr(learner.method._prompts, "texts") else None
    assert prompts is None or prompts.tasks[0].prompts == [["a bad photo of a class 0.", "a bad photo of a class 1."]]


def test_candidates_seen_asks_among_earlier_classes() -> None:
    """The loss of the second task rises where a class of the first one is near."""
    values = {}
    for candidates in ("task", "seen"):
        learner = clip_learner(ZSCL, candidates=candidates, image_weight=0.0, text_weight=0.0)
        plan = learner.plans()[1][0]
        at = Cursor(1, 0, 0, 0, 0)
        batch = learner.stream.batch(plan, at)
        values[candidates] = learner.method.losses(batch)["ce"].item()
    assert values["seen"] > values["task"]


# -- bad input -------------------------------------------------------------------------------------------------------
def test_a_backbone_without_texts_is_refused() -> None:
    from tiny import Flat, learner_for, make_store, split_scenario

    with pytest.raises(InputError, match="no text tower: take --backbone clip-small"):
        learner_for(split_scenario(make_store(), 2, setting="task"), ZSCL, backbone=Flat)


def test_prompts_that_are_missing_are_refused() -> None:
    with pytest.raises(InputError, match="prompt"):
        clip_learner(ZSCL, scenario=prompted(prompts={0: (), 1: ()}))


def test_an_online_stream_is_refused() -> None:
    with pytest.raises(InputError, match="online"):
        clip_learner(ZSCL, scenario=prompted(online=True))


def test_a_run_without_a_reference_set_is_refused() -> None:
    learner = clip_learner(ZSCL)
    learner.method.setting = dataclasses.replace(learner.method.setting, reference=None)
    with pytest.raises(InputError, match="reference set"):
        run(learner)


def test_images_of_another_task_are_refused() -> None:
    scenario = prompted()
    mixed = scenario.tasks[0]._replace(targets=scenario.tasks[1].targets)
    learner = clip_learner(ZSCL, scenario=dataclasses.replace(scenario, tasks=(mixed, scenario.tasks[1])))
    with pytest.raises(InputError, match="images of other classes"):
        run(learner)


def test_the_teacher_is_a_copy() -> None:
    backbone = tiny_clip()
    learner = clip_learner(ZSCL, backbone=lambda: backbone, lr=1e-2, schedule=SILENT)
    before = copy.deepcopy(learner.method._teacher.network.state_dict())
    run(learner)
    after = learner.method._teacher.network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert "_teacher" not in learner.method.state_dict()
    names = {id(p) for module in learner.method.modules() for p in module.parameters()}
    assert len(names) == len(list(backbone.parameters())), "the teacher is no part of what is judged or shipped"
