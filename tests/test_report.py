from __future__ import annotations

import json
import re
import shlex

import pytest

from qexport.exporter.outcome.result import (
    DecisionInfo,
    EngineInfo,
    FileInfo,
    Latency,
    LayerQuality,
    Quality,
    Result,
    SourceInfo,
    StepInfo,
    TaskScore,
)
from qexport.exporter.outcome.summary import (
    MAX_LINES,
    human_bytes,
    size_line,
    summary_lines,
    task_change,
    task_line,
)
from qexport.exporter.report.markdown import code, report_markdown, text

DIGEST = "sha256:" + "0" * 64


def make_result(**changes: object) -> Result:
    decisions = tuple(
        DecisionInfo(node=f"/layer.{i}/MatMul", op="MatMul", action="skipped", reason="too small") for i in range(6)
    )
    whole = {
        "version": "0.1.0",
        "directory": "build/my model",
        "target": "tensorrt-rtx",
        "source": SourceInfo(path="model.onnx", digest=DIGEST, bytes=90_900_000, nodes=300, parameters=22_700_000),
        "recipe": {"name": "int8"},
        "files": {
            "model.onnx": FileInfo(bytes=23_000_000, digest=DIGEST),
            "engine.plan": FileInfo(bytes=5, digest=DIGEST),
        },
        "steps": (
            StepInfo(name="fuse-gelu", modified=True, seconds=0.12, nodes=200, proof=3e-7),
            StepInfo(name="quantize", modified=True, seconds=1.5, nodes=400, decisions=decisions),
        ),
        "quantized": 72,
        "skipped": {"too small": 6, "next to softmax": 12},
        "bytes_before": 90_900_000,
        "bytes_after": 23_000_000,
        "quality": make_quality(),
        "latency": make_latency(2.0, 1.9, 2.1),
        "engine": EngineInfo(
            module="tensorrt_rtx",
            version="1.7.1",
            seconds=4.2,
            bytes=31_200_000,
            layers=973,
            compute_capabilities=("8.6",),
            profiles=({"input_ids": ([1, 1], [8, 16], [32, 128])},),
            note="no GPU here",
        ),
        "gates": {"max_drop": 1.0},
        "warnings": (),
        "seconds": 21.5,
        "peak_rss_bytes": 580_000_000,
    }
    return Result(**{**whole, **changes})


def make_quality(**changes: object) -> Quality:
    whole = {
        "data": "stsb-en-test.csv",
        "held_out": True,
        "samples": 2758,
        "output": "sentence_embedding",
        "cosine_mean": 0.98512,
        "cosine_worst": 0.9312,
        "worst_sample": 412,
        "sqnr": 15.25,
        "max_error": 0.07,
        "task": TaskScore(name="spearman", reference=82.03, result=81.71, drop=0.32),
        "layers": (
            LayerQuality(node="first", tensor="a", sqnr=30.0),
            LayerQuality(node="second", tensor="b", sqnr=12.5),
            LayerQuality(node="third", tensor="c", sqnr=21.0),
        ),
    }
    return Quality(**{**whole, **changes})


def make_latency(speedup: float, low: float, high: float) -> Latency:
    return Latency(
        runtime="onnxruntime 1.31.1",
        threads=1,
        shapes={"input_ids": [8, 128]},
        pairs=20,
        reference_ms=400.0,
        result_ms=400.0 / speedup,
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
    )


def fact(result: Result, label: str) -> str:
    return next(line for line in summary_lines(result) if line.startswith(label))


@pytest.mark.parametrize(
    ("drop", "line", "change"),
    [(0.32, "drop +0.32", "drop 0.32"), (-0.32, "drop -0.32", "better by 0.32"), (-0.001, "drop +0.00", "no drop")],
)
def test_a_change_that_rounds_to_nothing_has_no_sign(drop: float, line: str, change: str) -> None:
    task = TaskScore(name="top1", reference=90.0, result=90.0 - drop, drop=drop)
    assert f"({line})" in task_line(task)
    assert task_change(task) == change


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (1000, "as large"),
        (1009, "as large"),
        (991, "as large"),
        (1011, "LARGER"),
        (970, "a little smaller"),
        (500, "2.0x smaller"),
    ],
)
def test_sizes_that_differ_by_less_than_a_hundredth_are_alike(after: int, told: str) -> None:
    result = make_result().model_copy(update={"bytes_before": 1000, "bytes_after": after})
    assert size_line(result).endswith(f"({told})")


def test_the_summary_tells_sizes_counts_quality_speed_place_and_next_command() -> None:
    result = make_result()
    assert fact(result, "size").endswith("90.9 MB -> 23 MB (4.0x smaller)")
    assert fact(result, "quantized").endswith("72 nodes")
    assert fact(result, "skipped").endswith("18 nodes: 12 next to softmax, 6 too small")
    assert "cosine mean 0.9851, worst 0.9312 (sample 412)" in fact(result, "quality")
    assert "spearman 82.03 -> 81.71 (drop +0.32)" in fact(result, "task")
    assert "2.00x: faster" in fact(result, "latency")
    assert "tensorrt_rtx 1.7.1, 31.2 MB, 973 layers, built in 4.2 s, not run here; no GPU here" in fact(
        result, "engine"
    )
    assert "build/my model: model.onnx, engine.plan" in fact(result, "files")
    assert "max_drop 1" in fact(result, "gates")
    last = summary_lines(result)[-1]
    assert shlex.split(last) == ["next", "qexport", "inspect", "build/my model/model.onnx"]


def test_the_summary_says_plainly_when_the_result_is_slower() -> None:
    assert "SLOWER than float" in fact(make_result(latency=make_latency(0.8, 0.75, 0.85)), "latency")


def test_a_speedup_within_the_noise_is_not_called_faster() -> None:
    for speedup in (0.99, 1.01):
        line = fact(make_result(latency=make_latency(speedup, 0.95, 1.05)), "latency")
        assert "no faster than float, within the noise" in line


def test_the_summary_says_what_was_not_measured_and_what_grew() -> None:
    bare = make_result(quality=None, latency=None, engine=None, bytes_after=100_000_000, skipped={})
    assert "not measured" in fact(bare, "quality")
    assert "not measured" in fact(bare, "latency")
    assert "LARGER" in fact(bare, "size")
    assert not any(line.startswith(("engine", "task", "skipped")) for line in summary_lines(bare))


def test_a_note_on_the_latency_is_told_once() -> None:
    latency = make_latency(2.0, 1.9, 2.1).model_copy(update={"note": "measured elsewhere"})
    for warnings in ((), ("latency: measured elsewhere",)):
        told = " ".join(summary_lines(make_result(latency=latency, warnings=warnings)))
        assert told.count("measured elsewhere") == 1


def test_samples_that_calibrated_are_not_called_held_out() -> None:
    line = fact(make_result(quality=make_quality(held_out=False)), "quality")
    assert "held-out" not in line
    assert "from calibration" in line


@pytest.mark.parametrize("count", [0, 1, 4, 5, 40])
def test_the_summary_never_exceeds_its_lines_and_counts_the_warnings_it_drops(count: int) -> None:
    lines = summary_lines(make_result(warnings=tuple(f"trouble {i}" for i in range(count))))
    assert len(lines) <= MAX_LINES
    told = [line for line in lines if "trouble" in line]
    dropped = count - len(told)
    assert (f"and {dropped} more in report.html" in " ".join(lines)) == (dropped > 0)
    assert lines[-1].startswith("next")


def test_a_name_cannot_break_out_of_its_line() -> None:
    lines = summary_lines(make_result(skipped={"evil\nnext  rm -rf\x1b[31m": 1}))
    assert all("\n" not in line and "\x1b" not in line for line in lines)
    assert sum(line.startswith("next") for line in lines) == 1


@pytest.mark.parametrize(
    ("count", "told"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (22_710_000, "22.7 MB"),
        (10**16, "1e+04 TB"),
    ],
)
def test_bytes_are_told_in_three_digits(count: int, told: str) -> None:
    assert human_bytes(count) == told


def test_the_report_holds_every_part() -> None:
    report = report_markdown(make_result(warnings=("int8 is slower",)))
    for words in (
        "## Size",
        "## Quality",
        "## Layers",
        "## Latency",
        "## Engine",
        "## Decisions",
        "## Steps",
        "## Prov",
    ):
        assert words in report
    assert "> **Warning:** int8 is slower" in report
    assert "| spearman, drop | +0.32 | <= 1 |" in report
    assert "| 1 | fuse-gelu | yes | 200 | 0.12 | 3.0e-07 |" in report
    assert "| 0 | `input_ids` | [1, 1] | [8, 16] | [32, 128] |" in report


def test_layers_are_listed_noisiest_first() -> None:
    report = report_markdown(make_result())
    assert report.index("`second`") < report.index("`third`") < report.index("`first`")


def test_decisions_are_grouped_by_reason_with_a_few_examples() -> None:
    rows = [line for line in report_markdown(make_result()).splitlines() if line.startswith("| quantize")]
    shown = ", ".join(f"`/layer.{i}/MatMul`" for i in range(4))
    assert rows == [f"| quantize | skipped | `MatMul` | too small | 6 | {shown} and 2 more |"]


def test_every_row_of_every_table_has_as_many_cells_as_its_header() -> None:
    hostile = DecisionInfo(node="a|b`c\n## x", op="<img>", action="kept", reason="x | y\n\n# z *b*")
    steps = (StepInfo(name="quantize", modified=True, seconds=1, nodes=1, decisions=(hostile,)),)
    report = report_markdown(make_result(steps=steps))
    width = 0
    for line in report.splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        cells = len(re.findall(r"(?<!\\)\|", line))
        assert width in (0, cells), line
        width = cells
    assert "## x" not in re.findall(r"^## x", report, re.MULTILINE)
    assert "\n# z" not in report


def test_names_are_escaped_for_markdown() -> None:
    assert text("a_b*c|<d>") == "a\\_b\\*c\\|\\<d>"
    assert code("x`y|z\nw") == "`x'y\\|z w`"
    assert code("") == ""


def test_a_result_without_measurements_has_a_report_too() -> None:
    report = report_markdown(make_result(quality=None, latency=None, engine=None, steps=(), skipped={}, files={}))
    assert report.count("Not measured") == 2
    assert "## Engine" not in report


def test_a_result_survives_json() -> None:
    result = make_result()
    told = json.loads(result.model_dump_json(by_alias=True))
    assert told["schema"] == "qexport.result/1"
    assert Result.model_validate(told) == result


def with_cuts() -> Result:
    first = DecisionInfo(
        node="a|b", op="heads", action="pruned", reason="refitted", detail="without 1, 2", units=(9, 12)
    )
    second = DecisionInfo(node="c", op="heads", action="skipped", reason="all of it stays", units=(12, 12))
    third = DecisionInfo(node="d", op="neurons", action="pruned", reason="refitted", units=(1072, 1536))
    steps = (
        StepInfo(name="cleanup", modified=True, seconds=0.1, nodes=200, parameters=20_000_000),
        StepInfo(name="heads", modified=True, seconds=1, nodes=200, parameters=19_000_000, decisions=(first, second)),
        StepInfo(name="neurons", modified=True, seconds=1, nodes=200, parameters=15_000_000, decisions=(third,)),
        StepInfo(name="quantize", modified=True, seconds=1, nodes=400, parameters=15_100_000),
    )
    return make_result(steps=steps)


def test_the_summary_and_the_report_tell_what_was_cut_out() -> None:
    result = with_cuts()
    line = "21 of 24 heads, 1,072 of 1,536 neurons stay; 20,000,000 -> 15,000,000 parameters (25.0% fewer)"
    assert fact(result, "cut").endswith(line)
    report = report_markdown(result)
    assert f"## Cut: {line}" in report.replace("\\", "")
    assert "| heads | `a\\|b` | 9 of 12 | refitted | without 1, 2 |" in report


def test_a_model_that_lost_nothing_has_no_word_of_cuts() -> None:
    assert not any(line.startswith("cut") for line in summary_lines(make_result()))
    assert "## Cut" not in report_markdown(make_result())
    whole = DecisionInfo(node="d", op="neurons", action="skipped", reason="no more than 16 neurons", units=(16, 16))
    result = make_result(steps=(StepInfo(name="neurons", modified=False, seconds=1, nodes=2, decisions=(whole,)),))
    assert not any(line.startswith("cut") for line in summary_lines(result))
    assert "## Cut" not in report_markdown(result)
