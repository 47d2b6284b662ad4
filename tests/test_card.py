from __future__ import annotations

import pytest
import yaml
from report_trees import HOSTILE, hostile, replace_record, tiny

from qexport.exporter.outcome.result import EngineInfo
from qexport.exporter.report.card import model_card


def front_matter(card):
    """The YAML between the first two rulers, read by a YAML parser."""
    start, text, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(text)


def test_front_matter_is_yaml_with_what_catalogues_read():
    found = front_matter(model_card(*tiny()))
    assert found == {
        "base_model": "minilm",
        "library_name": "onnxruntime",
        "tags": ["onnx", "qexport", "int8", "ort-cpu", "quantized"],
        "metrics": ["spearman"],
    }


@pytest.mark.parametrize(
    ("path", "name"),
    [("nets/resnet.onnx", "resnet"), ("nets/bert/model.onnx", "bert"), ("model.onnx", "model"), ("bert", "bert")],
)
def test_a_model_is_called_by_its_file_or_its_folder(path, name):
    result, report = tiny()
    found = replace_record(result, source=replace_record(result.source, path=path))
    assert front_matter(model_card(found, report))["base_model"] == name


@pytest.mark.parametrize("name", [*HOSTILE[:-1], '"\n- x: [', "---\nbase_model: other", "caf\u00e9 \U0001f600"])
def test_no_name_ends_a_scalar_of_the_front_matter(name):
    result, report = tiny()
    changed = replace_record(
        result,
        source=replace_record(result.source, path=f"{name}/model.onnx"),
        recipe={"name": name},
        quality=replace_record(result.quality, task=replace_record(result.quality.task, name=name)),
    )
    found = front_matter(model_card(changed, report))
    assert set(found) == {"base_model", "library_name", "tags", "metrics"}
    assert len(found["tags"]) == 5
    assert len(found["metrics"]) == 1
    assert all(isinstance(text, str) for text in (*found["tags"], *found["metrics"], found["base_model"]))


def test_the_card_tells_numbers_run_and_limits():
    card = model_card(*tiny())
    for told in ("82.03", "81.71", "90.9 MB", "0.9312", "open_session", "stsb-en-test.csv", "max\\_drop", "sha256:"):
        assert told.replace("\\", "") in card.replace("\\", ""), told
    assert "2.00x (1.90 to 2.10)" in card
    assert "speed on ort-cpu was not measured" not in card


def test_what_was_not_measured_is_said():
    result, report = tiny()
    card = model_card(replace_record(result, quality=None, latency=None), report)
    assert "How good it is was not measured" in card
    assert "Its speed on ort-cpu was not measured" in card


def test_a_card_of_an_engine_says_what_it_needs():
    result, report = tiny()
    engine = EngineInfo(
        module="tensorrt", version="10.9", seconds=1, bytes=5, layers=3, compute_capabilities=("8.6",), profiles=()
    )
    card = model_card(replace_record(result, target="tensorrt", engine=engine), report)
    assert "`engine.plan` needs tensorrt 10.9 and a GPU of compute capability 8.6." in card
    anywhere = replace_record(engine, compute_capabilities=())
    card = model_card(replace_record(result, target="tensorrt", engine=anywhere), report)
    assert "`engine.plan` needs tensorrt 10.9 and a GPU that this release knows." in card
    assert front_matter(card)["library_name"] == "tensorrt"


def test_hostile_names_are_no_markup():
    card = model_card(*hostile())
    body = card.split("---\n", 2)[2]
    outside = "".join(part for i, part in enumerate(body.split("`")) if i % 2 == 0)
    assert "<script>" not in outside.replace("\\<script>", "")
    assert "\x1b" not in card
    assert "\x00" not in card
    assert len(card) < 50_000
