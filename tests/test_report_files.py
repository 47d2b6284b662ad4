"""The report's files: what is read back is what was written, in JSON and in Parquet."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest
from report_trees import hostile, large, tiny

import qexport
from qexport.errors import DataInvalid, UsageError
from qexport.exporter.report import files
from qexport.exporter.report.files import load_report, tables_of, write_report
from qexport.exporter.report.values import Node
from qexport.safe_io import finite, publish

parquet = pytest.importorskip("pyarrow.parquet")


def written(folder, result, report):
    """The names of a report's files, in a published folder."""
    with publish(folder) as stage:
        stage.write_json("result.json", finite(result.model_dump(mode="json", by_alias=True)))
        names = write_report(stage, report)
        stage.write_manifest()
    return names


@pytest.mark.parametrize("make", [tiny, hostile, lambda: large(3000)])
def test_what_was_written_is_read_back(tmp_path, make):
    result, report = make()
    written(tmp_path / "out", result, report)
    assert load_report(tmp_path / "out") == (result, report)


@pytest.mark.parametrize("name", ["result.json", "report.json"])
def test_a_folder_without_a_report_is_refused_with_what_to_name(tmp_path, name):
    written(tmp_path / "out", *tiny())
    assert qexport.load_report(str(tmp_path / "out")) == tiny()
    (tmp_path / "out" / name).unlink()
    with pytest.raises(UsageError, match=rf"{name} is not there \(name a folder that qexport build wrote\)"):
        qexport.load_report(tmp_path / "out")


@pytest.mark.parametrize("make", [tiny, hostile])
def test_tables_hold_what_the_json_holds(tmp_path, make):
    result, report = make()
    names = written(tmp_path / "out", result, report)
    told = json.loads((tmp_path / "out/report.json").read_bytes())
    assert set(names) == {"report.json", *(f"report-{name}.parquet" for name, _, _ in tables_of(report))}
    for name, cls, _ in tables_of(report):
        table = parquet.read_table(tmp_path / f"out/report-{name}.parquet")
        assert table.to_pylist() == told[name]
        assert table.column_names == [field.name for field in fields(cls)]
        assert table.schema.metadata[b"qexport.schema"] == b"qexport.report/1"


def test_an_empty_table_has_the_columns_and_types_of_a_full_one(tmp_path):
    result, report = tiny()
    written(tmp_path / "full", result, report)
    written(tmp_path / "empty", result, replace(report, nodes=(), activations=(), weights=(), points=(), samples=()))
    for name, _, _ in tables_of(report):
        full, empty = (parquet.read_table(tmp_path / f"{which}/report-{name}.parquet") for which in ("full", "empty"))
        assert empty.schema == full.schema
        assert empty.num_rows == 0


def test_a_measurement_that_is_missing_is_null_and_a_name_never_is(tmp_path):
    result, report = tiny()
    written(tmp_path / "out", result, report)
    table = parquet.read_table(tmp_path / "out/report-nodes.parquet")
    row = next(row for row in table.to_pylist() if row["name"] == "/Identity")
    assert row["scale"] is None
    assert not table.schema.field("name").nullable
    assert table.schema.field("scale").nullable


def test_the_same_report_gives_the_same_bytes(tmp_path):
    result, report = tiny()
    for name in ("a", "b"):
        written(tmp_path / name, result, report)
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert one == other


def test_without_pyarrow_there_is_json_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "can_write_tables", lambda: False)
    assert written(tmp_path / "out", *tiny()) == ("report.json",)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("report.json", lambda told: told | {"schema": "qexport.report/9"}),
        ("report.json", lambda told: told | {"nodes": [{"name": 1}]}),
        ("result.json", lambda told: told | {"quantized": "many"}),
    ],
)
def test_a_file_of_another_version_is_refused(tmp_path, name, change):
    written(tmp_path / "out", *tiny())
    path = tmp_path / "out" / name
    path.write_text(json.dumps(change(json.loads(path.read_bytes()))))
    with pytest.raises(DataInvalid, match=r"not a report of this version.*build the model again"):
        load_report(tmp_path / "out")


def test_numbers_that_are_not_finite_become_null(tmp_path):
    result, report = tiny()
    node = replace(report.nodes[0], error=float("inf"))
    written(tmp_path / "out", result, replace(report, nodes=(node,)))
    _, read = load_report(tmp_path / "out")
    assert read.nodes == (replace(node, error=None),)
    assert asdict(Node("a", "b", "c", "float"))["why"] == ()
