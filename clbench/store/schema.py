"""Every file of a run record and every key in it. The one place to look up, or to change, what a record holds.

A record is the folder `<runs>/<scenario>/<method>/<run id>/`:

| file | what | model |
|---|---|---|
| `spec.json` | what was run, every option resolved | `Spec` |
| `env.json` | where it ran: one entry per start | list of `Environment` |
| `curve.parquet` | hits of every group at every evaluation | `CURVE` |
| `losses.parquet` | what the method's steps returned | `LOSSES` |
| `matrix.csv` | `R[i, j]`, accuracy on group j after task i, on full test sets | `MATRIX_ROWS` |
| `predictions.parquet` | the answer to every test row after every task | `PREDICTIONS` |
| `summary.json` | all metrics, times, sizes | `Summary` |
| `curve.png`, `weights.safetensors` | picture; final weights (optional) | |
| `checkpoint/` | the newest two states of an unfinished run | `clbench.store.checkpoint` |
| `DONE` | the run is complete; sizes and sha256 of the files above | `Done` |

Change a key: raise `SCHEMA_VERSION`, and keep reading the older records.
"""

from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from clbench.metrics.registry import list_metrics

__all__ = [
    "CURVE",
    "LOSSES",
    "MATRIX_ROWS",
    "PREDICTIONS",
    "SCHEMA_VERSION",
    "Column",
    "Done",
    "Environment",
    "FileMark",
    "Hyperparameter",
    "Spec",
    "Summary",
]

# 2: curve.position, summary.memory_per_task and .levels, spec.eval_samples, more metrics
# 3: more metrics, summary.eval_batch, spec.protocol_family and .reference
SCHEMA_VERSION = 3


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# -- spec.json --------------------------------------------------------------------------------------------------------
class Hyperparameter(_Entry):
    """source: where the value comes from: `default`, `recipe: <paper, table>`, `--set`, `tuned on <scenario>`."""

    value: Any
    source: str


class Spec(_Entry):
    """What was run, every option resolved."""

    schema_version: int = SCHEMA_VERSION
    method: str  # id; a user's file goes by its stem
    method_file: str | None  # sha256 of a user's file, None for a method of the package
    hyperparameters: dict[str, Hyperparameter]
    scenario: str  # id with version: split-cifar100@1
    scenario_params: dict[str, Any]
    scenario_fingerprint: str
    datasets: list[str]
    data_fingerprint: str
    setting: Literal["class", "task", "domain"]
    num_tasks: int
    num_classes: int
    seed: int  # weights, batches, buffers
    order_seed: int  # class and stream order
    backbone: str
    backbone_options: dict[str, Any]
    backbone_fingerprint: str  # sha256 of its initial state
    pretrained_on: list[str]  # image collections; empty: from scratch
    weights: str | None  # name of the weights file, without its folder
    contaminated: str | None  # why the backbone knew the scenario's images beforehand; None if it did not
    train_view: str
    test_view: str
    batch_size: int
    epochs: int
    updates_per_batch: int
    mask: Literal["seen", "all", "task"]  # classes an answer may come from
    eval_every: int  # evaluate behind every so many steps, 0: never
    eval_dense: int  # and behind each of the first so many steps of a task
    eval_samples: int | None = None  # or behind every so many samples of the stream
    eval_per_group: int  # rows of a group's evaluation subset, at most
    precision: Literal["fp32", "bf16"]
    device_type: str  # cpu, cuda
    compile: bool = False  # torch.compile of the backbone
    cuda_graph: bool = False  # training steps captured as CUDA graphs
    fused: bool = False  # Triton kernels for reading images and counting hits
    evaluator: Literal["plain", "snapshot", "graph"] = "plain"  # how observations are carried out
    eval_batch: int | Literal["measured"] | None = None  # rows of one forward pass of an observation; None: by a rule
    reference_fingerprint: str | None = None  # of the reference set that the method read
    reference: dict[str, Any] | None = None  # its data sets, sizes, texts, and what it shares with scenario or backbone
    recipe: str | None  # source of the recipe that was used
    protocol_family: str | None = None  # of the scenario: A, B, C (clbench.scenarios.families)
    protocol_changes: list[str] = []  # what of the family's settings this run has changed
    sources: dict[str, str]  # option -> where its value comes from

    def decisive(self) -> dict[str, Any]:
        """What must agree for two specs to be of the same run: all but where values come from."""
        beside = {"schema_version", "recipe", "protocol_family", "protocol_changes", "sources"}
        beside |= {"evaluator", "eval_batch", "reference"}  # how it is watched; its fingerprint decides
        content = self.model_dump(mode="json", exclude=beside)
        content["hyperparameters"] = {key: entry["value"] for key, entry in content["hyperparameters"].items()}
        return content


# -- env.json ---------------------------------------------------------------------------------------------------------
class Environment(_Entry):
    """One start of the run. Nothing here changes its id."""

    started: str  # UTC, ISO 8601
    command: list[str]  # arguments; the home folder is written as ~
    clbench: str
    commit: str | None  # of the checkout that the package was imported from; None if it was installed
    dirty: bool | None  # whether the package differed from that commit
    python: str
    torch: str
    numpy: str
    platform: str  # system, release, machine
    processor: str
    num_processors: int
    num_threads: int  # of torch, inside one operation
    device: str  # as given to torch: cpu, cuda:0
    device_name: str
    device_memory_bytes: int | None
    cuda: str | None
    driver: str | None
    notes: list[str] = Field(default_factory=list)  # from which checkpoint it went on; which one was damaged


# -- summary.json -----------------------------------------------------------------------------------------------------
class Summary(_Entry):
    """What came out. On top of the fields: every key of `metrics/registry.toml`, and `<key>_se` where it has a sampling
    error; None where the metric is not defined for the run."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float | None] = Field(init=False)

    schema_version: int = SCHEMA_VERSION
    steps: int  # optimiser updates
    images_trained: int  # rows that went through a training step
    evaluations: int  # points of the curve
    eval_batch: int | None = None  # rows of one forward pass of them
    times: dict[str, float]  # wall-clock seconds over all starts, by part: train_s, evaluate_s, data_s, save_s ...
    peak_memory_bytes: int  # of the device; on a CPU resident in the process
    num_parameters: int
    memory_bytes: dict[str, int]  # kept between tasks besides the network, by name
    memory_per_task: list[dict[str, int]] = []  # the same after each task
    levels: list[dict[str, float | None]] = []  # per label level, where there are several: see `metrics.per_level`
    forward_flops_per_image: int  # of the backbone, 2 per multiply-add
    weights_sha256: str  # of the deployed weights, to compare runs bit by bit

    @model_validator(mode="before")
    @classmethod
    def _migrate(cls, content: Any) -> Any:
        """Metrics that came later are None in an older record."""
        if isinstance(content, dict) and content.get("schema_version", SCHEMA_VERSION) < 3:  # none came later
            return {**{key: None for metric in list_metrics() for key in metric.keys}, **content}
        return content

    @model_validator(mode="after")
    def _has_all_metrics(self) -> Self:
        expected = {key for metric in list_metrics() for key in metric.keys}
        given = set(self.__pydantic_extra__)
        if given != expected:
            odd = ", ".join(sorted(given ^ expected))
            raise ValueError(f"keys that are not in the registry of metrics, or missing from here: {odd}")
        return self


# -- DONE -------------------------------------------------------------------------------------------------------------
class FileMark(_Entry):
    bytes: int
    sha256: str


class Done(_Entry):
    schema_version: int = SCHEMA_VERSION
    files: dict[str, FileMark]


# -- tables -----------------------------------------------------------------------------------------------------------
class Column(NamedTuple):
    """kind: an arrow type name, or `name` for a dictionary-encoded string."""

    key: str
    kind: Literal["int16", "int32", "int64", "float64", "name"]
    meaning: str


CURVE = (  # schema metadata `clbench`: JSON with schema_version, groups (name, task, subset size), task_ends, phases
    Column("step", "int64", "updates done; 0 is the untrained state"),
    Column("task", "int16", "task during which it was evaluated"),
    Column("phase", "int16", "phase of the method inside the task"),
    Column("position", "int64", "samples streamed so far; -1: not known (schema version 1)"),
    Column("group", "name", "evaluation group; only those evaluated at that point have a row"),
    Column("hits", "int32", "right answers"),
    Column("total", "int32", "rows of the group's evaluation subset"),
)
LOSSES = (
    Column("step", "int64", "number of the update, from 1"),
    Column("name", "name", "key that the method's step returned"),
    Column("value", "float64", ""),
)
PREDICTIONS = (
    Column("row", "int32", "row of the store"),
    Column("target", "int32", "class id that counts as right"),
    Column("after_task", "int16", "index of the task that had just been learned"),
    Column("prediction", "int32", "class id answered"),
)
MATRIX_ROWS = {  # first column of matrix.csv; the others are the groups
    "size": "number of test rows of the group",
    "before": "accuracy before any training (only if it was measured)",
    "0 .. K-1": "accuracy after that task, fraction; empty if not evaluated",
}
