"""Reports to draw and to write: a small one with all there is, one of hostile names, and large ones."""

from __future__ import annotations

from dataclasses import replace

from qexport.exporter.outcome.result import (
    BackedOff,
    DecisionInfo,
    FileInfo,
    Latency,
    LayerQuality,
    OutputQuality,
    Quality,
    Result,
    SampleQuality,
    SourceInfo,
    StepInfo,
    TaskScore,
    Tried,
)
from qexport.exporter.report.values import (
    Activation,
    Candidate,
    Channel,
    Choice,
    Dot,
    Node,
    Point,
    Report,
    Roofline,
    Sample,
    Verdict,
    Weights,
)

DIGEST = "sha256:" + "0" * 64
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAAAAABX3VL4AAAADElEQVR4nGNg+A+EAAYAAf+T0eSJAAAAAElFTkSuQmCC"
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "\"><img src=x onerror='window.hacked = 1'>",
    "' onmouseover='window.hacked=1",
    "</style><script>window.hacked = 1</script>",
    "</title></svg><h1>gone</h1>",
    "]]><!-- {{ 7 * 7 }} {% raw %}",
    "javascript:window.hacked=1//http://example.com/a.js url(//b)",
    "null \x00 bell \x07 escape \x1b[31m",
    "right \u202e to left, \u2066isolated\u2069",
    "n" * 1_000_000,
)


def tiny() -> tuple[Result, Report]:
    """A build of four nodes with something in every panel."""
    return make_result(), make_report()


def hostile() -> tuple[Result, Report]:
    """As many nodes as there are hostile names, which also stand wherever else a model's text may."""
    result, report = tiny()
    bad = HOSTILE[0]
    nodes = tuple(
        replace(
            report.nodes[0], name=name, op=name[:40], block=name, why=(Choice("quantize", "quantized", name, name),)
        )
        for name in HOSTILE
    )
    activations = tuple(replace(report.activations[0], value=name, readers=HOSTILE) for name in HOSTILE)
    weights = tuple(replace(report.weights[0], node=name) for name in HOSTILE)
    assert report.roofline is not None
    report = replace(
        report,
        verdict=replace(report.verdict, sentence=bad, facts=HOSTILE[:-1]),
        nodes=nodes,
        activations=activations,
        weights=weights,
        points=tuple(replace(point, label=HOSTILE[1]) for point in report.points),
        roofline=replace(report.roofline, machine=bad, dots=tuple(replace(d, node=bad) for d in report.roofline.dots)),
        samples=tuple(replace(report.samples[0], text=name, shapes=name) for name in HOSTILE),
        missing={"tornado": bad},
    )
    decisions = tuple(DecisionInfo(node=n, op=n[:40], action="quantized", reason=n, detail=n) for n in HOSTILE)
    step = replace_record(result.steps[0], name=bad, decisions=decisions)
    quality = replace_record(
        result.quality, data=bad, output=HOSTILE[1], task=replace_record(result.quality.task, name=bad)
    )
    source = replace_record(result.source, path=f"models/{HOSTILE[1]}/{bad}.onnx")
    return replace_record(
        result,
        source=source,
        directory=bad,
        steps=(step,),
        skipped={bad: 2},
        quality=quality,
        latency=replace_record(result.latency, runtime=bad, note=bad, shapes={bad: [1, 2]}),
        backed_off=(BackedOff(nodes=HOSTILE, reason=bad, detail=HOSTILE[1]),),
        recipe={"name": bad, "step": [{"pass": bad}]},
        warnings=HOSTILE[:-1],
    ), report


def large(count: int) -> tuple[Result, Report]:
    """A build of ``count`` nodes; one in ten has a histogram and a weight."""
    result, report = tiny()
    nodes = tuple(
        replace(
            report.nodes[i % 4], name=f"/model/layers.{i // 100}/block_{i}/MatMul", block=f"/model/layers.{i // 100}"
        )
        for i in range(count)
    )
    names = [node.name for node in nodes[:: max(10, count // 1000)]]
    return result, replace(
        report,
        nodes=nodes,
        activations=tuple(replace(report.activations[0], value=f"{name}_in", readers=(name,)) for name in names),
        weights=tuple(replace(report.weights[0], node=name, worst=report.weights[0].worst * 8) for name in names),
    )


def replace_record(record, **changes):
    """A pydantic record with other values."""
    return record.model_copy(update=changes)


def make_report() -> Report:
    quantized = Node(
        name="/encoder/layer.0/query/MatMul",
        op="MatMul",
        block="/encoder/layer.0/query",
        state="quantized",
        activation="uint8",
        weight="int8",
        scale=0.0213,
        zero_point=128,
        weight_scale=(0.0004, 0.0031),
        sqnr_own=34.5,
        sqnr=28.25,
        error=0.0021,
        ms_before=1.5,
        ms_after=0.5,
        bytes_before=589_824,
        bytes_after=148_992,
        why=(Choice("quantize", "quantized", "a product with a constant weight", "int8 x uint8"),),
    )
    kept = replace(
        quantized,
        name="/encoder/layer.0/output/MatMul",
        block="/encoder/layer.0/output",
        state="kept",
        activation="float32",
        weight="float32",
        scale=None,
        zero_point=None,
        weight_scale=None,
        sqnr=26.0,
        error=0.04,
        ms_after=1.5,
        bytes_after=589_824,
        why=(Choice("triage", "kept", "its error outweighs others: 41% of the sum"),),
    )
    float_ = Node(
        "/encoder/layer.0/Softmax", "Softmax", "/encoder/layer.0", "float", "float32", ms_before=0.2, ms_after=0.2
    )
    gone = Node("/Identity", "Identity", "", "gone", why=(Choice("cleanup", "removed", "it does nothing"),))
    return Report(
        verdict=Verdict("as good", "As good as the float model, 3.8x smaller and 2.0x faster.", ("drop 0.32 points",)),
        nodes=(quantized, kept, float_, gone),
        activations=(make_activation(quantized.name),),
        weights=(make_weights(quantized.name),),
        points=(
            Point("float", 2, 0.0, "points", 90_900_000, 10.0, 1.0, True, True, False, True),
            Point("all in 8 bits", 0, 1.5, "points", 23_000_000, 4.8, 2.08, True, False, False, True),
            Point("result", 1, 0.32, "points", 24_000_000, 5.0, 2.0, True, True, True, True),
            Point("1 more in float", 2, 0.2, "points", 25_000_000, None, None, False, True, False, False),
        ),
        roofline=Roofline(
            "a processor",
            2,
            6e10,
            2.4e11,
            1.2e10,
            (
                Dot(quantized.name, "float", 20.0, 5e10, 1.5),
                Dot(quantized.name, "result", 55.0, 1.5e11, 0.5),
            ),
        ),
        samples=(
            Sample(412, 0.9312, "a man is playing a flute", "input_ids [12], attention_mask [12]"),
            Sample(7, 0.94, "", "image [1, 8, 8]", PNG),
        ),
        deciles=tuple(0.93 + 0.0069 * i for i in range(11)),
        missing={},
    )


def make_activation(reader: str) -> Activation:
    edges = tuple(-2.0 + i * 0.1 for i in range(81))
    counts = tuple(max(0, 2000 - 60 * abs(i - 20)) for i in range(80))
    return Activation(
        value="/encoder/layer.0/input",
        readers=(reader,),
        kind="uint8",
        low=-2.0,
        high=6.0,
        scale=0.0213,
        zeros=17,
        total=sum(counts) + 17,
        edges=edges,
        counts=counts,
        candidates=(
            Candidate("chosen", -1.8, 3.6, 0.001, 0.0004),
            Candidate("minmax", -2.0, 6.0, 0.0, 0.0009),
            Candidate("percentile", -1.5, 3.2, 0.002, 0.0006),
            Candidate("entropy", -1.2, 2.9, 0.004, 0.0011),
            Candidate("mse", -1.9, 3.7, 0.0008, 0.00035),
        ),
    )


def make_weights(node: str) -> Weights:
    worst = tuple(Channel(i, -0.9 + 0.1 * i, -0.1, 0.0, 0.1, 0.8 - 0.1 * i) for i in range(4))
    return Weights(node, 1, 384, (0.05, 0.09, 0.11, 0.15, 0.9), 8.2, worst)


def make_result() -> Result:
    worst = (SampleQuality(index=412, cosine=0.9312), SampleQuality(index=7, cosine=0.94))
    decision = DecisionInfo(
        node="/encoder/layer.0/query/MatMul", op="MatMul", action="quantized", reason="a product with a constant weight"
    )
    return Result(
        version="0.1.0",
        directory="build/minilm",
        target="ort-cpu",
        source=SourceInfo(path="minilm/model.onnx", digest=DIGEST, bytes=90_900_000, nodes=300, parameters=22_700_000),
        recipe={"name": "int8", "export": {"target": "ort-cpu"}, "step": [{"pass": "quantize"}]},
        files={"model.onnx": FileInfo(bytes=24_000_000, digest=DIGEST)},
        steps=(StepInfo(name="quantize", modified=True, seconds=1.5, nodes=400, decisions=(decision,)),),
        quantized=1,
        skipped={"next to softmax": 1},
        bytes_before=90_900_000,
        bytes_after=24_000_000,
        quality=Quality(
            data="stsb-en-test.csv",
            held_out=True,
            samples=2758,
            output="sentence_embedding",
            cosine_mean=0.98512,
            cosine_worst=0.9312,
            worst_sample=412,
            sqnr=15.25,
            max_error=0.07,
            task=TaskScore(name="spearman", reference=82.03, result=81.71, drop=0.32),
            layers=(LayerQuality(node="/encoder/layer.0/query/MatMul", tensor="q", sqnr=28.25),),
            outputs={
                "sentence_embedding": OutputQuality(
                    cosine_mean=0.98512, cosine_worst=0.9312, worst_sample=412, sqnr=15.25, max_error=0.07
                )
            },
            worst=worst,
            deciles=tuple(0.93 + 0.0069 * i for i in range(11)),
        ),
        latency=Latency(
            runtime="onnxruntime 1.31.1",
            threads=2,
            shapes={"input_ids": [8, 16]},
            pairs=40,
            reference_ms=10.0,
            result_ms=5.0,
            speedup=2.0,
            speedup_low=1.9,
            speedup_high=2.1,
        ),
        engine=None,
        backed_off=(BackedOff(nodes=("/encoder/layer.0/output/MatMul",), reason="slower than float", detail="1.2x"),),
        tried=(Tried(kept=0, loss=1.5, unit="points", bytes=23_000_000, ms=4.8, speedup=2.08, fits=False),),
        gates={"max_drop": 1.0},
        warnings=("sample 412 has a cosine of 0.931",),
        seconds=21.5,
        peak_rss_bytes=580_000_000,
    )
