"""``qexport diff``: sides, measurements, conditions on them, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import call, save_model

import qexport
from qexport.errors import GateFailed, IntegrityError, UsageError
from qexport.exporter.compare.changes import NO_GRAPHS
from qexport.exporter.compare.conditions import check, parse
from qexport.exporter.compare.metrics import METRICS, TASKS
from qexport.exporter.compare.nodes import NodeChange
from qexport.exporter.compare.sides import Side, open_side
from qexport.exporter.options import BuildOptions
from qexport.exporter.outcome.result import Latency, LayerQuality, Quality, Result, SourceInfo, TaskScore


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two artefacts of one model, int8 with different calibration, and their source."""
    folder = tmp_path_factory.mktemp("built")
    source = save_model(folder / "model.onnx")
    for number, width in enumerate((1, 3)):
        data = width * np.random.default_rng(number).standard_normal((48, 32)).astype(np.float32)
        np.savez(folder / f"{number}.npz", x=data)
        options = BuildOptions(output=folder / f"out{number}", set=("export.never_worse=false",))
        qexport.build(source, calib=folder / f"{number}.npz", target="ort-cpu", options=options)
    return folder


def test_two_builds_with_other_data_differ_in_scales_alone(built):
    found = qexport.diff(built / "out0", built / "out1")
    assert {change.kind for change in found.nodes} == {"scale"}
    assert [fact.name for fact in found.made] == ["calibration data"]
    assert found.made[0].a != found.made[0].b
    by_name = {change.name: change for change in found.metrics}
    assert by_name["bytes"].delta == 0
    assert by_name["cosine_mean"].delta is None  # judged on what each calibrated with
    assert any("judged on different data" in note for note in found.notes)
    assert any("separate runs" in note for note in found.notes)


def test_a_build_against_itself_is_the_same(built):
    found = qexport.diff(built / "out0", built / "out0")
    assert found.same
    assert all(change.delta == 0 for change in found.metrics)


def test_a_float_model_against_its_int8_build_tells_precisions_and_what_came(built):
    found = qexport.diff(built / "model.onnx", built / "out0")
    assert {change.kind for change in found.nodes} <= {"precision", "operator", "added", "removed", "wiring"}
    assert any("int8" in change.b for change in found.nodes)
    size = next(change for change in found.metrics if change.name == "bytes")
    assert (size.a, size.b) == tuple((built / name).stat().st_size for name in ("model.onnx", "out0/model.onnx"))


def test_a_result_alone_is_a_side_without_a_graph(built):
    for other in (built / "out1/result.json", open_side(built / "out1").result):
        found = qexport.diff(built / "out0", other)
        assert found.nodes == ()
        assert NO_GRAPHS in found.notes
        assert {"latency", "bytes", "nodes", "quantized"} <= {change.name for change in found.metrics}


def test_an_artefact_that_was_changed_is_refused(built, tmp_path):
    for name in ("model.onnx", "result.json"):
        folder = tmp_path / name
        folder.mkdir()
        for path in (built / "out0").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).write_bytes((folder / name).read_bytes() + b" ")
        with pytest.raises(IntegrityError, match=name):
            open_side(folder)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("nowhere", None, "no such file"),
        ("result.json", "{}", "not a result"),
        ("result.json", "[]", "not the result of a build"),
        ("result.json", "\0", "not"),
        ("result.json", '{"schema": "qexport.result/9"}', "schema"),
    ],
)
def test_what_is_no_side_is_refused(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=told):
        open_side(tmp_path / name)


# ---------------------------------------------------------------- measurements and conditions


def result(score=80.0, ms=10.0, size=1000, **changed):
    quality = Quality(
        data="test.csv",
        held_out=True,
        samples=100,
        output="y",
        cosine_mean=0.99,
        cosine_worst=0.9,
        worst_sample=3,
        sqnr=30.0,
        max_error=0.0,
        task=TaskScore(name="spearman", reference=82.0, result=score, drop=82.0 - score),
    )
    latency = Latency(
        runtime="onnxruntime CPU",
        threads=1,
        shapes={"x": [8, 32]},
        pairs=15,
        reference_ms=20.0,
        result_ms=ms,
        speedup=20.0 / ms,
        speedup_low=1.0,
        speedup_high=3.0,
    )
    fields = {
        "version": "0.1.0",
        "directory": "out",
        "target": "ort-cpu",
        "source": SourceInfo(path="m", digest="sha256:1", bytes=1, nodes=1, parameters=1),
        "recipe": {"name": "int8", "step": [{"pass": "quantize", "min_sqnr": 22.0}], "export": {"target": "ort-cpu"}},
        "files": {},
        "steps": (),
        "quantized": 4,
        "skipped": {},
        "bytes_before": 4000,
        "bytes_after": size,
        "quality": quality,
        "latency": latency,
        "engine": None,
        "gates": {},
        "warnings": (),
        "seconds": 1.0,
        "peak_rss_bytes": 1,
    }
    return Result(**{**fields, **changed})


def test_numbers_are_the_second_minus_the_first():
    found = {change.name: change for change in qexport.diff(result(), result(score=79.5, ms=12.0, size=500)).metrics}
    assert found["spearman"].delta == pytest.approx(-0.5)
    assert found["latency"].delta == pytest.approx(2.0)
    assert found["latency"].percent == pytest.approx(20.0)
    assert found["bytes"].percent == pytest.approx(-50.0)
    assert found["max_error"].percent is None  # of zero there is none
    assert "top1" not in found
    assert "engine_bytes" not in found


def test_a_notebook_shows_numbers_and_nodes_and_escapes_names():
    nodes = (NodeChange(name="<script>", kind="weights", a="1", b="2"),)
    shown = qexport.diff(result(), result(score=79.5)).model_copy(update={"nodes": nodes})._repr_html_()
    assert "spearman" in shown
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown


def test_how_both_were_made_is_told_setting_by_setting():
    other = result(
        recipe={"name": "int8", "step": [{"pass": "quantize", "min_sqnr": 18.0}], "export": {"target": "ort-cuda"}},
        source=SourceInfo(path="m", digest="sha256:2", bytes=1, nodes=1, parameters=1),
    )
    made = {fact.name: (fact.a, fact.b) for fact in qexport.diff(result(), other).made}
    assert made == {
        "source": ("sha256:1", "sha256:2"),
        "step quantize": ("min_sqnr=22.0", "min_sqnr=18.0"),
        "export.target": ("ort-cpu", "ort-cuda"),
    }


def test_steps_are_told_by_name_those_of_one_side_together_and_their_order_where_it_differs():
    def made(*steps):
        return result(recipe={"name": "int8", "step": [{"pass": name, **options} for name, options in steps]})

    ours = made(("cleanup", {}), ("smooth", {"alpha": 0.5}), ("quantize", {}), ("cleanup", {}))
    theirs = made(("quantize", {"min_sqnr": 18.0}), ("cleanup", {}), ("triage", {}), ("smooth", {"enabled": False}))
    assert {fact.name: (fact.a, fact.b) for fact in qexport.diff(ours, theirs).made} == {
        "step quantize": ("defaults", "min_sqnr=18.0"),
        "steps of this side alone": ("smooth {alpha=0.5}, cleanup (2)", "triage"),
        "order of the others": ("cleanup, quantize", "quantize, cleanup"),
    }


def test_an_engine_that_is_gone_or_of_another_release_is_told():
    engine = {"module": "tensorrt", "version": "10.3.0", "bytes": 100, "layers": 7, "compute_capabilities": ["8.6"]}
    newer = Side("b", result(), engine={**engine, "version": "11.0.0", "bytes": 150})
    found = qexport.diff(Side("a", result(), engine=engine), newer)
    assert [(fact.name, fact.a, fact.b) for fact in found.engine] == [("version", "10.3.0", "11.0.0")]
    assert next(change.percent for change in found.metrics if change.name == "engine_bytes") == 50
    gone = qexport.diff(Side("a", result(), engine=engine), Side("b", result()))
    assert {fact.name: fact.b for fact in gone.engine} == {"module": "", "version": "", "compute_capabilities": ""}


CONDITIONS = [
    ("spearman<-0.2", "fails"),
    ("spearman < -0.2", "fails"),
    ("  spearman<-.2  ", "fails"),
    ("spearman<-0.5", "holds"),
    ("spearman<=-0.5", "fails"),
    ("spearman>-0.6", "fails"),
    ("latency>+3%", "fails"),
    ("latency>3%", "fails"),
    ("latency > 20 %", "holds"),
    ("latency>=20%", "fails"),
    ("latency>1.9", "fails"),
    ("latency>2e0", "holds"),
    ("latency>2.5e-1", "fails"),
    ("speedup<-10%", "fails"),
    ("bytes>0", "holds"),
    ("cosine_mean<-0.001", "holds"),
    ("quantized<0", "holds"),
    ("max_error>1%", "percentage"),
    ("top1<-1", "not measured"),
    ("engine_bytes>0", "not measured"),
    ("speerman<-1", "did you mean 'spearman'"),
    ("latecny>1", "did you mean 'latency'"),
    ("spearman", "not a condition"),
    ("spearman<", "not a condition"),
    ("spearman==1", "not a condition"),
    ("spearman<nan", "not a condition"),
    ("spearman<1e999", "not a condition"),
    ("spearman<-0.2 or latency>1", "not a condition"),
    ("__import__('os')<1", "not a condition"),
    ("", "not a condition"),
]


@pytest.mark.parametrize(("text", "outcome"), CONDITIONS)
def test_a_condition_fails_holds_or_is_refused(text, outcome):
    found = qexport.diff(result(), result(score=79.5, ms=12.0))
    if outcome == "holds":
        check(found, [parse(text)])
    elif outcome == "fails":
        with pytest.raises(GateFailed, match="a change of"):
            check(found, [parse(text)])
    else:
        with pytest.raises(UsageError, match=outcome):
            check(found, [parse(text)])


def test_what_cannot_be_compared_is_no_pass():
    other = result(latency=result().latency.model_copy(update={"threads": 4}))
    found = qexport.diff(result(), other)
    with pytest.raises(UsageError, match="latency cannot be compared: timed in different ways"):
        check(found, [parse("latency>1")])
    with pytest.raises(UsageError, match="not measured on the second side"):
        check(qexport.diff(result(), result(quality=None)), [parse("spearman<0")])


def test_the_time_of_a_result_that_its_target_did_not_run_is_no_speed():
    foreign = result(target="tensorrt-rtx", latency=result().latency.model_copy(update={"foreign": True}))
    for sides in ((result(), foreign), (foreign, result()), (foreign, foreign)):
        with pytest.raises(UsageError, match="tensorrt-rtx did not run here"):
            check(qexport.diff(*sides), [parse("latency>1")])
        with pytest.raises(UsageError, match="tensorrt-rtx did not run here"):
            check(qexport.diff(*sides), [parse("speedup<0")])


def test_layers_and_outputs_are_compared_where_they_were_judged_alike():
    layers = (LayerQuality(node="n", tensor="t", sqnr=20.0),)
    judged = result().quality.model_copy(update={"layers": layers})
    other = judged.model_copy(update={"samples": 50})
    with pytest.raises(UsageError, match="judged on different data"):
        check(qexport.diff(result(quality=judged), result(quality=other)), [parse("sqnr_worst_layer<0")])
    other = judged.model_copy(update={"output": "z"})
    found = qexport.diff(result(quality=judged), result(quality=other))
    with pytest.raises(UsageError, match="different outputs: y; z"):
        check(found, [parse("cosine_mean<0")])
    check(found, [parse("spearman<0"), parse("sqnr_worst_layer<0")])


def test_data_is_the_same_where_its_samples_are_whatever_it_is_called():
    renamed = result(quality=result().quality.model_copy(update={"data": "elsewhere.csv"}))
    one, other = ({"calibration": "sha256:1", "evaluation": f"sha256:{end}"} for end in "23")
    check(qexport.diff(Side("a", result(), data=one), Side("b", renamed, data=one)), [parse("spearman<0")])
    with pytest.raises(UsageError, match=r"judged on different data: test\.csv, .*sha256:2; test\.csv, .*sha256:3"):
        check(qexport.diff(Side("a", result(), data=one), Side("b", result(), data=other)), [parse("spearman<0")])


def test_scores_by_other_labels_are_not_compared():
    def scored(reference, digest="sha256:1"):
        task = TaskScore(name="spearman", reference=reference, result=reference, drop=0.0)
        source = SourceInfo(path="m", digest=digest, bytes=1, nodes=1, parameters=1)
        return result(quality=result().quality.model_copy(update={"task": task}), source=source)

    with pytest.raises(UsageError, match="different labels: the float model has 82; 41"):
        check(qexport.diff(scored(82.0), scored(41.0)), [parse("spearman<-0.2")])
    check(qexport.diff(scored(82.0), scored(82.05)), [parse("spearman<-0.2")])
    with pytest.raises(GateFailed):
        check(qexport.diff(scored(82.0), scored(41.0, "sha256:2")), [parse("spearman<-0.2")])


def test_every_condition_that_fails_is_named():
    found = qexport.diff(result(), result(score=79.5, ms=12.0))
    with pytest.raises(GateFailed) as failure:
        check(found, [parse("spearman<-0.2"), parse("bytes>0"), parse("latency>3%")])
    assert failure.value.what == (
        "spearman<-0.2: 80 -> 79.5, a change of -0.5 points; latency>3%: 10 -> 12, a change of +20%"
    )


def test_every_metric_can_be_asked_for_and_is_on_the_page():
    page = (Path(__file__).resolve().parents[1] / "docs/diff-and-verify.md").read_text(encoding="utf-8")
    for name in (*METRICS, *TASKS):
        assert parse(f"{name}>0").metric == name
        assert f"`{name}`" in page


# ---------------------------------------------------------------- the command


def test_the_command_prints_the_table_and_then_fails(built, capsys):
    one, other = str(built / "out0"), str(built / "out1")
    code, out, err = call(capsys, "diff", one, other)
    assert (code, err) == (0, "")
    assert "nodes: 1 scale; --nodes lists them" in out
    code, out, err = call(capsys, "diff", one, other, "--nodes", "--fail-if", "bytes>=0")
    assert code == 7
    assert "bytes>=0: " in err
    assert "input 0" in out


def test_the_command_says_with_json_one_object_and_the_same_exit_code(built, capsys):
    one, other = str(built / "out0"), str(built / "out1")
    code, out, err = call(capsys, "diff", one, other, "--fail-if", "bytes>=0", "--json")
    told = json.loads(out)
    assert (code, err, told["schema"]) == (7, "", "qexport.diff/1")
    assert [change["kind"] for change in told["nodes"]] == ["scale"]
    assert told["failed"] == ["bytes>=0: " + told["failed"][0].partition(": ")[2]]
    code, out, _ = call(capsys, "diff", one, other, "--fail-if", "spearman<0", "--json")
    told = json.loads(out)
    assert (code, told["schema"], told["exit_code"]) == (2, "qexport.error/1", 2)


def test_graphs_that_were_not_compared_are_not_called_equal(built, capsys):
    code, out, _ = call(capsys, "diff", str(built / "out0"), str(built / "out1/result.json"))
    assert (code, "no difference" in out, NO_GRAPHS in out) == (0, False, True)


def test_a_condition_that_cannot_be_read_is_told_before_any_work(capsys):
    code, out, err = call(capsys, "diff", "nowhere", "nowhere", "--fail-if", "latecny>1")
    assert (code, out) == (2, "")
    assert "did you mean 'latency'" in err
