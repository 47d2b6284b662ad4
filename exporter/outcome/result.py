"""The outcome of a build as validated values; the same object is ``result.json``, ``--json`` and the Python API's."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileInfo(_Record):
    """One published file: size in bytes and ``sha256:`` digest."""

    bytes: int
    digest: str


class SourceInfo(_Record):
    """The model that was given. ``parameters`` counts elements of initializers."""

    path: str
    digest: str
    bytes: int
    nodes: int
    parameters: int


class DecisionInfo(_Record):
    """One choice of one pass; see ``qexport.passes.base.Decision``."""

    node: str
    op: str
    action: str
    reason: str
    detail: str = ""
    units: tuple[int, int] | None = None


class StepInfo(_Record):
    """One pass of the recipe.

    ``parameters`` counts elements of initializers afterwards. ``proof`` is the worst relative error against the step
    before, if it had to be equal.
    """

    name: str
    modified: bool
    seconds: float
    nodes: int
    parameters: int = 0
    proof: float | None = None
    decisions: tuple[DecisionInfo, ...] = ()


class TaskScore(_Record):
    """A task metric before and after, in points (x100) where ``better`` is ``higher``; a positive ``drop`` is a loss.

    ``unchanged`` is the share of equal predictions (top-1).
    """

    name: str
    better: Literal["higher", "lower"] = "higher"
    reference: float
    result: float
    drop: float
    unchanged: float | None = None


class LayerQuality(_Record):
    """Signal-to-quantization-noise ratio in dB of one tensor against its float activation."""

    node: str
    tensor: str
    sqnr: float


class OutputQuality(_Record):
    """Float against result at one output; the fields are those of ``Quality``."""

    cosine_mean: float
    cosine_worst: float
    worst_sample: int
    sqnr: float
    max_error: float


class SampleQuality(_Record):
    """The cosine of one sample between both models' main outputs."""

    index: int
    cosine: float


class Quality(_Record):
    """Float against result on the same samples.

    Attributes:
        data: Where the samples came from.
        held_out: Whether none of them was used for calibration.
        samples: How many.
        output: The main output, which the numbers here and the task are of.
        cosine_mean: Mean over samples of the cosine between both outputs.
        cosine_worst: The smallest.
        worst_sample: Index of the sample with the smallest cosine.
        sqnr: Over all samples, dB.
        max_error: Largest absolute difference.
        task: Metric of the task, if the data carries labels.
        layers: Per quantized layer, in graph order.
        outputs: Every output that was compared, the main one among them.
        worst: The samples with the smallest cosines, worst first.
        deciles: Of the cosines of all samples: 0, 10 ... 100 percent.
    """

    data: str
    held_out: bool
    samples: int
    output: str
    cosine_mean: float
    cosine_worst: float
    worst_sample: int
    sqnr: float
    max_error: float
    task: TaskScore | None = None
    layers: tuple[LayerQuality, ...] = ()
    outputs: dict[str, OutputQuality] = Field(default_factory=dict)
    worst: tuple[SampleQuality, ...] = ()
    deciles: tuple[float, ...] = ()

    @property
    def worst_output(self) -> str:
        """The output with the smallest cosine of any sample."""
        return min(self.outputs, key=lambda name: self.outputs[name].cosine_worst, default=self.output)

    @property
    def least_mean(self) -> float:
        """The smallest mean cosine of any output."""
        return min([self.cosine_mean, *(found.cosine_mean for found in self.outputs.values())])

    @property
    def least(self) -> float:
        """The smallest cosine of any sample at any output."""
        return min([self.cosine_worst, *(found.cosine_worst for found in self.outputs.values())])


class Latency(_Record):
    """A paired measurement: float and result in turn in one run. ``speedup`` is the median of the pairwise ratios.

    ``foreign`` says that the file is laid out for another backend than the one that was timed.
    """

    runtime: str
    threads: int
    shapes: dict[str, list[int]]
    pairs: int
    reference_ms: float
    result_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    foreign: bool = False
    note: str = ""


class BackedOff(_Record):
    """A region that went back to float because int8 was worse there.

    ``reason`` is the same for the same cause, ``detail`` has this region's numbers; the times are those of its
    operators in the runtime's profile, where speed was the cause.
    """

    nodes: tuple[str, ...]
    reason: str
    detail: str
    float_ms: float | None = None
    quantized_ms: float | None = None


class Tried(_Record):
    """A choice of layers that was built and judged on the way to the one that was published.

    ``kept`` counts nodes that were back in float; ``loss`` is the task's drop where there is a task, else 1 - the mean
    cosine, as ``unit`` says: "points", the name of a metric that is better where it is lower, or "1 - cosine". The time
    of one call is there where it was measured.
    """

    kept: int
    loss: float | None
    unit: str
    bytes: int
    ms: float | None = None
    speedup: float | None = None
    fits: bool = True


class EngineInfo(_Record):
    """An engine that was built.

    ``profiles`` maps input name to min, opt and max shape; ``metadata`` is what the model says of itself to runtimes,
    which an engine cannot; ``note`` says why it cannot run on this machine; ``timings`` says whether the builder knew
    the times of kernels from an earlier build: ``used``, ``new`` or ``refused``, empty where it measures none.
    """

    module: str
    version: str
    seconds: float
    bytes: int
    layers: int
    compute_capabilities: tuple[str, ...]
    profiles: tuple[dict[str, tuple[list[int], list[int], list[int]]], ...]
    metadata: dict[str, str] = Field(default_factory=dict)
    ran: bool = False
    note: str = ""
    timings: Literal["", "new", "used", "refused"] = ""


class Result(_Record):
    """Everything a build found out.

    Attributes:
        schema_version: Version of this schema; ``schema`` in JSON.
        version: Of qexport.
        directory: The folder that was published.
        target: Where the result runs.
        source: The model as it came.
        recipe: What was run, with all settings, as a recipe file has it.
        files: Name to size and digest of model, engine and what came along; the manifest has those of all files.
        steps: Every pass, in the order in which they ran.
        quantized: How many nodes are quantized in the end.
        skipped: Reason to number of nodes that are not.
        bytes_before: Size of the model as it came, with its weights.
        bytes_after: Size of the result, with its weights; an engine is counted by itself.
        quality: Float against result; ``None`` without data.
        latency: Both in turn; ``None`` where nothing was timed.
        engine: ``None`` where the target has none.
        backed_off: What went back to float, and why.
        tried: What was built and judged before that.
        gates: Name of each gate that was asked for to its limit.
        warnings: What is doubtful.
        resumed: Stages that an equal build had done already.
        seconds: Until this was written; the report is made of it.
        peak_rss_bytes: Of the process of the build, at most.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    schema_version: Literal["qexport.result/1"] = Field("qexport.result/1", alias="schema")
    version: str
    directory: str
    target: str
    source: SourceInfo
    recipe: dict[str, Any]
    files: dict[str, FileInfo]
    steps: tuple[StepInfo, ...]
    quantized: int
    skipped: dict[str, int]
    bytes_before: int
    bytes_after: int
    quality: Quality | None
    latency: Latency | None
    engine: EngineInfo | None
    backed_off: tuple[BackedOff, ...] = ()
    tried: tuple[Tried, ...] = ()
    gates: dict[str, float]
    warnings: tuple[str, ...]
    resumed: tuple[str, ...] = ()
    seconds: float
    peak_rss_bytes: int

    def _repr_html_(self) -> str:
        from qexport.exporter.report.notebook import fragment

        return fragment(self)
