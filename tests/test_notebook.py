from __future__ import annotations

from html.parser import HTMLParser

import pytest
from report_trees import HOSTILE, hostile, replace_record, tiny

from qexport.exporter.outcome.export_result import CheckInfo, ExportResult, Verification
from qexport.exporter.outcome.intact import FileCheck
from qexport.exporter.outcome.result import SourceInfo
from qexport.exporter.precision.plan import Plan, Point
from qexport.exporter.precision.sensitivity import LayerRow, Sensitivity
from qexport.exporter.replay import Replayed
from qexport.exporter.report.notebook import ROWS, fragment, table_html

ALLOWED = {"div", "b", "table", "thead", "tbody", "tr", "th", "td"}


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words = [], set(), []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.words.append(data)


def checked(text):
    """What a fragment is made of; anything but plain tables is refused."""
    found = Tags(text)
    assert set(found.tags) <= ALLOWED
    assert found.attributes <= {"style"}
    return " ".join(found.words)


def test_a_build_shows_its_verdict_and_its_numbers():
    words = checked(fragment(tiny()[0]))
    for told in (
        "mixed",
        "82.03",
        "81.71",
        "90.9 MB",
        "24 MB",
        "5.00",
        "1.90 to 2.10×",
        "build/minilm",
        "cosine of 0.931",
    ):
        assert told in words, told


def test_a_build_that_grew_or_gained_is_not_said_to_be_smaller_or_to_have_lost():
    result = tiny()[0]
    task = replace_record(result.quality.task, result=82.13, drop=-0.1)
    better = replace_record(result, quality=replace_record(result.quality, task=task), bytes_after=100_000_000)
    words = checked(fragment(better))
    assert "better by 0.10" in words
    assert "LARGER" in words
    assert "as large" in checked(fragment(replace_record(better, bytes_after=90_900_001)))


def test_a_build_that_was_not_measured_shows_what_there_is():
    words = checked(fragment(replace_record(tiny()[0], quality=None, latency=None)))
    assert "unmeasured" in words
    assert "24 MB" in words


def test_names_in_a_fragment_are_escaped():
    words = checked(fragment(hostile()[0]))
    assert "<script>" in words  # as text


def test_cells_of_a_table_are_escaped_and_written_as_numbers():
    text = table_html(("name", "value:"), [(name, 0.123456) for name in HOSTILE] + [("truth", True), ("nothing", None)])
    words = checked(text)
    assert text.count("<tr>") == 1 + len(HOSTILE) + 2
    assert "0.1235" in words
    assert "yes" in words
    assert len(text) < 10_000


def test_rows_after_the_last_one_are_counted():
    text = table_html(("i:",), ((i,) for i in range(ROWS + 7)))
    assert "7 more rows" in text
    assert text.count("<tr>") == 1 + ROWS


def test_a_row_of_another_width_than_the_header_is_an_error():
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        table_html(("a", "b"), [("one",)])


def test_a_plan_marks_what_was_chosen():
    point = Point(
        quantized=5,
        kept=1,
        drop=0.25,
        cosine_mean=0.99,
        cosine_worst=0.98,
        bytes=24_000_000,
        milliseconds=5.125,
        speedup=2.0,
        foreign=False,
        fits=True,
    )
    plan = Plan(
        model="<b>net</b>.onnx",
        target="ort-cpu",
        data="pairs.csv",
        task="spearman",
        budget={"max_drop": 0.5},
        points=(point, replace_record(point, kept=2, fits=False)),
        chosen=0,
        keep=("first",),
        warnings=("few samples",),
    )
    words = checked(plan._repr_html_())
    assert "<b>net</b>.onnx for ort-cpu: 1 layers stay in float" in words
    assert words.count("▶") == 1
    assert "5.125" in words
    assert "few samples" in words


def test_a_sensitivity_analysis_lists_its_layers():
    row = LayerRow(
        node="<i>query</i>",
        op="MatMul",
        error=0.002,
        sqnr=27.0,
        cosine_mean=0.99,
        cosine_worst=0.98,
        estimate=None,
        layer_sqnr=30.0,
        bytes=5,
        share=0.1,
    )
    found = Sensitivity(
        model="net.onnx",
        target="ort-cpu",
        data="pairs.csv",
        samples=8,
        task=None,
        activations=(),
        layers=(row,),
        correlation=0.9,
        warnings=(),
    )
    words = checked(found._repr_html_())
    assert "<i>query</i>" in words
    assert "27.00" in words


def test_an_export_shows_its_proof():
    check = CheckInfo(
        what="prefill", output="logits", numbers=9, error=1e-6, allowed_error=1e-4, rms=1e-7, allowed_rms=1e-5
    )
    result = ExportResult(
        version="0.1.0",
        directory="build/net",
        source=SourceInfo(path="net", digest="sha256:0", bytes=1, nodes=0, parameters=0),
        door="own-folder",
        family="llama",
        task=None,
        dtype="float32",
        layout="cached",
        parts={},
        verification=Verification(reference="numpy", data="made up", made_up=True, checks=(check,)),
        files={},
        warnings=("made-up data",),
        seconds=1.0,
        peak_rss_bytes=1,
    )
    words = checked(result._repr_html_())
    assert "logits" in words
    assert "held against numpy" in words
    assert "made-up data" in words


@pytest.mark.parametrize(("same", "told"), [(True, "nothing speaks against it"), (False, "not the same")])
def test_a_replay_shows_every_file_and_what_is_different_around_it(same, told):
    verdict = "same" if same else "differs"
    file = FileCheck(name="<i>model</i>.onnx", digest="sha256:1", found="sha256:2", verdict=verdict)
    found = Replayed(
        schema="qexport.verify/1", folder="build/net", files=(file,), replayed=True, same=same, notes=("x",)
    )
    words = checked(found._repr_html_())
    for part in (f"build/net, built again: {told}", "<i>model</i>.onnx", verdict, "sha256:1", "sha256:2", "▲ x"):
        assert part in words, part
