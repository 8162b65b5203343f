"""The schema of report.json: what a run found out.

Figures that could not be measured are a NotMeasured with the reason, never 0 and never missing. Keys may be added to
the schema, not renamed. Intervals are 95 % intervals, (low, high). Times are in milliseconds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1
FILE = "report.json"
RunStatus = Literal["ok", "failed", "over_budget"]
StageStatus = Literal["ok", "unchanged", "rolled_back", "failed"]
Verdict = Literal["faster", "slower", "same"]
Interval = tuple[float, float]
Cell = str | float | int | None  # of a table; None where there is nothing to say
TOGETHER = 3  # columns that one picture tells apart


@dataclass(frozen=True)
class NotMeasured:
    """Why there is no figure."""

    not_measured: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """Quality on those samples of the test split that share a class, a label or a slice of the user's."""

    by: str  # "class", "label", or the slice's name
    label: str
    n: int
    value: float | NotMeasured
    ci95: Interval | NotMeasured
    delta: float | NotMeasured
    delta_ci95: Interval | NotMeasured


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Quality on the test split, and its difference from the baseline's on the same samples (a point is 0.01)."""

    metric: str
    value: float
    ci95: Interval
    n: int
    delta: float
    delta_ci95: Interval
    higher_is_better: bool = True
    unit: Literal["fraction", "value"] = "fraction"  # a share between 0 and 1, or any other number
    gained: int | NotMeasured = NotMeasured("the metric is not right or wrong per sample")  # right only now
    lost: int | NotMeasured = NotMeasured("the metric is not right or wrong per sample")  # right only in the baseline
    mcnemar_p: float | NotMeasured = NotMeasured("the metric is not right or wrong per sample")
    groups: list[Group] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of one call, in one runtime, with one batch size and number of threads.

    speedup: time of the baseline as it came in / this time.
    speedup_same_runtime: time of the unoptimised baseline in the same runtime / this time.
    """

    runtime: str
    batch_size: int
    threads: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    std_ms: float  # jitter
    throughput: float  # samples per second, one caller
    speedup: float
    speedup_ci95: Interval
    speedup_same_runtime: float | NotMeasured
    speedup_same_runtime_ci95: Interval | NotMeasured
    verdict: Verdict
    verdict_same_runtime: Verdict | NotMeasured
    calls: int  # timed
    replicas: int  # fresh processes that they were timed in
    load_ms: float  # of the saved model, into a process whose runtime and classes are imported
    first_call_ms: float
    preview: bool = False  # of a file exported only to be measured
    other_load_cores: float = 0.0  # cores that other processes of the machine kept busy meanwhile
    samples: str = ""  # file in the run's folder with every call's time
    quantiles_ms: list[float] = field(default_factory=list)  # 0 %, 5 %, … 100 % of the calls, for a picture
    replica_p50_ms: list[float] = field(default_factory=list)  # in each process, as the following
    replica_speedups: list[float] = field(default_factory=list)
    replica_speedups_same_runtime: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Callers:
    """Several threads that call one model at once."""

    callers: int
    throughput: float  # samples per second, all callers together
    p50_ms: float
    p95_ms: float


@dataclass(frozen=True, kw_only=True)
class Sustained:
    """Calls without a pause: does the machine heat up and slow down?"""

    seconds: float
    p50_ms: list[float]  # of equal spans of that time, in order
    drift: float  # time of the last sixth / of the first sixth


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One cause why a model is not faster, read from the runtime's own optimised graph and profile."""

    cause: str  # "float_operators", "call_overhead", …
    share: float | NotMeasured  # of the time of a call that it accounts for
    evidence: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator of the runtime's optimised graph."""

    name: str
    kind: str
    ms: float  # of one call
    share: float  # of all operators' time
    operations: int | NotMeasured = NotMeasured("not counted for this kind of operator")  # 2 per multiply and add
    bytes: int | NotMeasured = NotMeasured("shapes are not known")  # read and written


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """How close a call comes to what this machine can do (Williams et al. 2009)."""

    operations: int  # of one call, 2 per multiply and add
    bytes: int  # read and written by the operators of one call
    compute_ms: float  # the operations at the measured matrix peak of their type
    memory_ms: float  # the bytes at the measured bandwidth
    overhead_ms: float  # measured cost of a call and of its operators' dispatch
    p50_ms: float
    share_of_limit: float  # the largest of the three / p50
    binds: Literal["compute", "memory", "overhead"]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Size, quality, latency and memory of one model."""

    size_bytes: int | NotMeasured
    quality: Quality | NotMeasured
    latency: list[Latency] | NotMeasured
    peak_memory_bytes: int | NotMeasured  # resident, load and inference, interpreter included
    threads: int = 1  # the target's
    energy_joules: float | NotMeasured = NotMeasured("nothing was timed")  # of one call at batch 1
    callers: list[Callers] = field(default_factory=list)
    sustained: Sustained | NotMeasured = NotMeasured("not asked for; benchmark.sustained_seconds=60 measures it")
    findings: list[Finding] = field(default_factory=list)
    roofline: Roofline | NotMeasured = NotMeasured("only the final model's is computed")
    operators: list[Operator] = field(default_factory=list)  # slowest first
    compressed_bytes: int | NotMeasured = NotMeasured(
        "not looked at"
    )  # of a download: what size_bytes counts, deflated
    cached: bool = False  # measured by an earlier run on such a machine

    def headline(self) -> Latency | None:
        """Latency at batch 1 with the target's threads, where it could be measured."""
        entries = [] if isinstance(self.latency, NotMeasured) else self.latency
        return next((entry for entry in entries if (entry.batch_size, entry.threads) == (1, self.threads)), None)

    def content(self) -> dict[str, Any]:
        """What was measured, without where and when that was."""
        known = asdict(self)
        for entry in known["latency"] if isinstance(known["latency"], list) else ():
            del entry["samples"]
        del known["cached"]
        return known

    def with_grid(self, grid: list[Latency]) -> Measurement:
        """The same with the other points of a grid behind the headline."""
        first = self.headline()
        if first is None:
            wanted = (1, self.threads)
            return replace(self, latency=sorted(grid, key=lambda entry: (entry.batch_size, entry.threads) != wanted))
        point = (first.runtime, first.batch_size, first.threads)
        others = [entry for entry in grid if (entry.runtime, entry.batch_size, entry.threads) != point]
        return replace(self, latency=[first, *others])


NOT_COMPARED = NotMeasured("it did not run to its end beside others")


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One alternative that was tried for a step."""

    method: str
    ok: bool
    reason: str
    chosen: bool = False  # of alternatives that compete
    seconds: float = 0.0  # of its stages' own work, without measuring
    latency: Latency | NotMeasured = NOT_COMPARED
    size_bytes: int | NotMeasured = NOT_COMPARED
    quality_drop: float | NotMeasured = NOT_COMPARED  # on validation, from the model that came in
    quality_drop_ci95: Interval | NotMeasured = NOT_COMPARED


@dataclass(kw_only=True)
class Table:
    """What a stage found out of each layer, round or setting, and how it is drawn.

    Numbers may be NumPy's. What JSON has no number for is kept in words: ∞, −∞, unknown.
    """

    title: str
    columns: list[str]  # with their units: "SQNR, dB"
    rows: list[list[Cell]]
    chart: list[str | list[str]] = field(default_factory=list)  # a picture over the first column for each; a list: one
    note: str = ""

    def __post_init__(self) -> None:
        for name in self.columns:
            if self.columns.count(name) > 1:
                raise ValueError(f"table '{self.title}' names the column '{name}' twice")
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table '{self.title}' has {len(self.columns)} columns, but a row of {len(row)}: {row}"
                )
        self.rows = [[_cell(value, self.title) for value in row] for row in self.rows]
        for names in map(self.drawn, self.chart):
            if unknown := [name for name in names if name not in self.columns[1:]]:
                known = ", ".join(self.columns[1:])
                raise ValueError(f"table '{self.title}' draws '{unknown[0]}', which is none of its columns {known}")
            if len(names) > TOGETHER:
                raise ValueError(f"table '{self.title}' draws {len(names)} columns in one picture; {TOGETHER} at most")

    @staticmethod
    def drawn(entry: str | list[str]) -> list[str]:
        """The columns of one picture, of which `chart` lists several."""
        return [entry] if isinstance(entry, str) else entry

    def column(self, name: str) -> list[Cell]:
        """What stands in one column, from top to bottom."""
        place = self.columns.index(name)
        return [row[place] for row in self.rows]


def _cell(value: Any, title: str) -> Cell:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Integral):
        return int(value)
    if not isinstance(value, Real):
        kind = type(value).__name__
        raise ValueError(f"table '{title}' holds {value!r} of type {kind}; give a number, a string or None")
    number = float(value)
    if math.isfinite(number):
        return number
    return "unknown" if math.isnan(number) else "∞" if number > 0 else "−∞"


NOT_REHEARSED = NotMeasured("the step was not rehearsed")
NOT_REUSED = NotMeasured("this run computed it")


@dataclass(kw_only=True)
class StageResult:
    """One step of the pipeline."""

    key: str
    stage: str
    status: StageStatus
    seconds: float
    form: str
    measurement: Measurement | NotMeasured
    cached: bool = False  # taken from the store; `seconds` are those of taking it
    computed_seconds: float | NotMeasured = NOT_REUSED  # when it was computed
    store_key: str = ""  # of its result, sha256; empty where that cannot be identified
    model_sha256: str = ""  # of the model that it gave: graph and tensors, not a file's bytes
    attempts: list[Attempt] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    peak_memory_bytes: int | NotMeasured = NotMeasured("the stage did not run to its end")  # of optpipe's process
    predicted_seconds: float | NotMeasured = NOT_REHEARSED
    predicted_peak_memory_bytes: int | NotMeasured = NOT_REHEARSED


@dataclass(frozen=True, kw_only=True)
class Final:
    """The model that came out."""

    artifact: str
    measurement: Measurement
    quality_drop: float | NotMeasured = NotMeasured("an older version wrote this report")  # on validation samples
    quality_drop_ci95: Interval | NotMeasured = NotMeasured("an older version wrote this report")


@dataclass(frozen=True, kw_only=True)
class Check:
    """One limit of the budget, judged once."""

    where: str  # the step's key, or "run"
    limit: str  # "quality_drop", …
    allowed: float
    value: float | NotMeasured  # the point estimate
    bound: float | NotMeasured  # the true value is inside it with probability `confidence`
    holds: bool
    undecided: bool  # the 95 % interval straddles the limit
    said: str  # in words


@dataclass(kw_only=True)
class BudgetReport:
    """The limits of the run, every time that one was judged, and those that its result breaks."""

    limits: dict[str, float]
    policy: str
    confidence: float = 0.5
    checks: list[Check] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Report:
    """report.json."""

    recipe: str
    overrides: list[str]
    environment: dict[str, Any]
    budget: BudgetReport
    status: RunStatus = "failed"
    schema: int = SCHEMA
    command: str = ""  # that reproduces the run
    data_fingerprint: str = ""  # the task's; empty where it has none
    mlflow_run_id: str = ""
    seconds: float = 0.0
    model_seconds: float = 0.0  # of `seconds`, what making (or training) the incoming model and its data took
    rehearsal_seconds: float = 0.0  # of `seconds`, what the rehearsal took
    measuring_seconds: float = 0.0  # of `seconds`, what measuring and previews took
    overhead_seconds: float = 0.0  # of `seconds`, what is left beside those and the stages' own
    baseline: Measurement | NotMeasured = field(default_factory=lambda: NotMeasured("the run ended before"))
    stages: list[StageResult] = field(default_factory=list)
    final: Final | NotMeasured = field(default_factory=lambda: NotMeasured("the run ended before"))
    notes: list[str] = field(default_factory=list)
    error: str = ""

    def write(self, folder: Path) -> Path:
        """Write report.json into `folder`, whole or not at all."""
        partial = folder / f".{FILE}.partial"
        partial.write_text(json.dumps(asdict(self), indent=2, allow_nan=False, default=str) + "\n")
        return partial.rename(folder / FILE)

    @classmethod
    def read(cls, folder: Path) -> Report:
        """The report of the run in `folder`.

        Raises FileNotFoundError if there is none, ValueError if it is not of this schema.
        """
        loaded = json.loads((folder / FILE).read_text())
        if not isinstance(loaded, dict) or loaded.get("schema") != SCHEMA:
            raise ValueError(f"{folder / FILE} is not a report of schema {SCHEMA}")
        report: Report = typed(cls, loaded)
        return report


def typed(kind: Any, value: Any) -> Any:
    """`value`, as JSON gives it, as the type `kind`: dataclasses, unions of them, lists and tuples."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        choices = typing.get_args(kind)
        if value is None:
            return None
        if isinstance(value, dict) and set(value) == {"not_measured"}:
            return NotMeasured(**value)
        return typed(next((choice for choice in choices if choice is not NotMeasured), Any), value)
    if origin is list:
        return [typed(typing.get_args(kind)[0], item) for item in value]
    if origin is tuple:
        return tuple(value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = {name: typed(hints[name], item) for name, item in value.items() if name in hints}
        try:
            return kind(**known)  # type: ignore[operator]
        except TypeError as error:
            raise ValueError(f"report.json does not fit schema {SCHEMA}: {error}") from error
    return value
