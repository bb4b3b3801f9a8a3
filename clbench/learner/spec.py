"""What a user asks for: one run, before anything is looked up."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["RunSpec"]


class RunSpec(BaseModel):
    """One run. None means: take the recipe's value, else the scenario's, else the default.

    set: hyperparameters given by name. scenario_params: parameters of the scenario's builder given by name.
    order_seed: class and stream order, `seed` if None. eval_every: steps between evaluations, 0 for none.
    eval_per_group: test rows of each group per evaluation. epochs: passes per task where the scenario is not online.
    updates_per_batch: optimiser steps on each batch.
    evaluator, eval_batch: how observations are carried out (`clbench.evaluator.engine`), and rows of one forward pass:
    a number, `measured`, or None for a rule; the numbers that come out are the same.
    fused: Triton kernels for reading and counting. cuda_graph: training steps captured as CUDA graphs. compile:
    torch.compile of the backbone. All three round differently, so they are part of what a run is.
    data: folders searched first. checkpoint_every: steps; None saves every minute.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    scenario: str
    seed: int = Field(default=0, ge=0)
    order_seed: int | None = Field(default=None, ge=0)
    set: dict[str, Any] = {}
    scenario_params: dict[str, Any] = {}
    backbone: str | None = None
    backbone_options: dict[str, Any] = {}
    weights: Path | None = None
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    mask: Literal["seen", "all", "task"] | None = None
    eval_every: int | None = Field(default=None, ge=0)
    eval_per_group: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    epochs: int | None = Field(default=None, ge=1)
    updates_per_batch: int | None = Field(default=None, ge=1)
    train_view: str | None = None
    test_view: str | None = None
    evaluator: Literal["plain", "snapshot", "graph"] = "plain"
    eval_batch: Annotated[int, Field(ge=1)] | Literal["measured"] | None = None
    fused: bool = False
    cuda_graph: bool = False
    compile: bool = False
    data: tuple[Path, ...] = ()
    out: Path = Path("results/runs")
    allow_contamination: bool = False
    checkpoint_every: int | None = Field(default=None, ge=1)
    threads: int | None = Field(default=None, ge=1)
    keep_weights: bool = False
    keep_checkpoint: bool = False
