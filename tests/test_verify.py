"""``qexport verify``: every file is the one that was written, and the same inputs give the same bytes again."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import onnx
import pytest
from helpers import call, exported

import qexport
from qexport.errors import IntegrityError, UnsafeInput, UsageError
from qexport.exporter import replay
from qexport.exporter.options import BuildOptions, Silent
from qexport.exporter.outcome.intact import is_replayed
from qexport.exporter.outcome.receipt import ReplayInfo
from qexport.exporter.precision.bench import BuildBench
from qexport.exporter.precision.costs import Cost
from qexport.exporter.precision.recalled import RecallingBench
from qexport.exporter.recipe_files import load_recipe, override
from qexport.exporter.replay import replay_recipe

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 32] x) => (float[n, 32] y) { a = MatMul(x, w1)
    b = Tanh(a)
    c = MatMul(b, w2)
    d = Tanh(c)
    e = MatMul(d, w3)
    f = Tanh(e)
    y = MatMul(f, w4) }"""
ANYWAY = ("export.never_worse=false",)


def save(path, seed=0):
    proto = onnx.parser.parse_model(TEXT)
    rng = np.random.default_rng(seed)
    for number in range(1, 5):
        array = rng.standard_normal((32, 32)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, f"w{number}"))
    for number, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}{number // 2 + 1}"
    path.write_bytes(proto.SerializeToString())
    return path


def save_data(path, seed=1, count=48):
    np.savez(path, x=np.random.default_rng(seed).standard_normal((count, 32)).astype(np.float32))
    return path


def build(folder, output="out", settings=ANYWAY, **asked):
    options = BuildOptions(output=folder / output, set=settings)
    asked = {"calib": folder / "calib.npz", "eval": folder / "eval.npz", **asked}
    return qexport.build(folder / "model.onnx", target="ort-cpu", options=options, **asked)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a model, its data, and what was built of them in ``out``."""
    folder = tmp_path_factory.mktemp("made")
    save(folder / "model.onnx")
    (folder / "config.json").write_text("{}")
    save_data(folder / "calib.npz")
    save_data(folder / "eval.npz", 2, 20)
    build(folder)
    return folder


@pytest.fixture
def room(made, tmp_path):
    """A copy of all that, whose manifest names the copies."""
    shutil.copytree(made, tmp_path / "room")
    folder = tmp_path / "room"

    def move(manifest):
        for name, given in (("model", "model.onnx"), ("calib", "calib.npz"), ("eval", "eval.npz")):
            manifest["replay"][name]["path"] = str(folder / given)

    edit(folder / "out", move)
    return folder


def edit(folder, change):
    """Change a manifest."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def verdicts(found):
    return {file.name: file.verdict for file in found.files}


def state(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_the_same_inputs_give_the_same_bytes_and_nothing_else_is_touched(made):
    before, around = state(made / "out"), sorted(made.iterdir())
    found = qexport.verify(made / "out")
    assert (found.same, found.replayed) == (True, True)
    told = verdicts(found)
    assert {name for name, verdict in told.items() if verdict == "same"} == {"model.onnx", "config.json"}
    assert set(told.values()) == {"same", "intact"}
    assert set(told) == {path.name for path in (made / "out").iterdir()} - {"manifest.json"}
    assert found.notes == ()
    assert state(made / "out") == before
    assert sorted(made.iterdir()) == around


def test_the_manifest_says_what_was_given(made):
    info = ReplayInfo.model_validate(json.loads((made / "out/manifest.json").read_bytes())["replay"])
    data = (made / "model.onnx").read_bytes()
    assert info.model.path == str(made / "model.onnx")
    assert info.model.digest == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert (info.calib.path, info.eval.path) == (str(made / "calib.npz"), str(made / "eval.npz"))
    assert info.overrides == ANYWAY
    assert info.keep == {}


def test_a_flipped_bit_in_any_file_is_found_and_the_file_is_named(room):
    names = sorted(path.name for path in (room / "out").iterdir() if path.name != "manifest.json")
    assert len(names) >= 4
    for name in names:
        path = room / "out" / name
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(IntegrityError, match=rf"1 of \d+ files.*: {name} \(differs\)"):
            qexport.verify(room / "out")
        path.write_bytes(good)


def test_all_files_that_are_missing_or_changed_are_named_at_once(room):
    (room / "out/model.onnx").unlink()
    (room / "out/report.md").write_text("mine")
    with pytest.raises(IntegrityError, match=r"model.onnx \(missing\).*report.md \(differs\)"):
        qexport.verify(room / "out", files=True)


def test_a_file_that_the_manifest_does_not_list_is_told(room):
    (room / "out/tokenizer.json").write_text("{}")
    found = qexport.verify(room / "out", files=True)
    assert found.notes == ("the manifest does not list 'tokenizer.json'",)
    assert (found.same, found.replayed, set(verdicts(found).values())) == (True, False, {"intact"})


def test_a_model_that_does_not_come_from_these_inputs_differs_although_its_digest_fits(room):
    model = onnx.load(room / "out/model.onnx")
    forged = next(tensor for tensor in model.graph.initializer if len(tensor.raw_data) == 1024)
    forged.raw_data = bytes([forged.raw_data[0] ^ 1]) + forged.raw_data[1:]
    data = model.SerializeToString()
    (room / "out/model.onnx").write_bytes(data)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    edit(room / "out", lambda manifest: manifest["files"]["model.onnx"].update(digest=digest, bytes=len(data)))
    found = qexport.verify(room / "out")
    assert not found.same
    assert verdicts(found)["model.onnx"] == "differs"


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("calib.npz", lambda path: save_data(path, 7)),
        ("calib.npz", lambda path: path.write_bytes(b"nothing")),
        ("eval.npz", lambda path: save_data(path, 8, 20)),
        ("model.onnx", lambda path: save(path, 9)),
        ("model.onnx", lambda path: path.write_bytes(path.read_bytes()[:-3])),
    ],
)
def test_inputs_that_changed_are_told_before_the_work(room, monkeypatch, name, write):
    write(room / name)
    monkeypatch.setattr(replay, "run_recipe", None)
    with pytest.raises(IntegrityError, match=f"{name}.*not what the build was given"):
        qexport.verify(room / "out")


class Stages(Silent):
    """Remembers what is done."""

    def __init__(self):
        self.names = []

    def stage(self, name, total=None):
        self.names.append(name)
        return super().stage(name, total)


def test_a_replay_judges_and_times_nothing(room, monkeypatch):
    for name in ("judge", "time", "costs", "errors"):
        monkeypatch.setattr(BuildBench, name, None)
    stages = Stages()
    assert qexport.verify(room / "out", progress=stages).same
    assert stages.names == ["files", "inputs", "recipe", "write"]


def test_inputs_that_have_moved_are_asked_for(room):
    (room / "model.onnx").rename(room / "moved.onnx")
    with pytest.raises(UsageError, match=r"model.onnx.*not there.*--model PATH"):
        qexport.verify(room / "out")
    (room / "calib.npz").rename(room / "moved.npz")
    with pytest.raises(UsageError, match=r"calib.npz.*not there.*--calib PATH"):
        qexport.verify(room / "out", model=room / "moved.onnx")
    (room / "eval.npz").unlink()
    found = qexport.verify(room / "out", model=room / "moved.onnx", calib=room / "moved.npz")
    assert found.same
    assert len(found.notes) == 1
    assert "evaluation data" in found.notes[0]


def test_samples_that_a_function_gave_are_given_again(room):
    def samples():
        return [{"x": row} for row in np.load(room / "calib.npz")["x"]]

    build(room, "given", calib=samples, eval=None)
    with pytest.raises(UsageError, match=r"a function of Python.*not there.*--calib"):
        qexport.verify(room / "given")
    assert qexport.verify(room / "given", calib=samples).same
    assert qexport.verify(room / "given", calib=room / "calib.npz").same
    with pytest.raises(IntegrityError, match="not what the build was given"):
        qexport.verify(room / "given", calib=lambda: samples()[1:])


def test_an_input_that_the_build_did_not_have_is_refused(room):
    edit(room / "out", lambda manifest: manifest["replay"].update(eval=None))
    with pytest.raises(UsageError, match="was not given any --eval"):
        qexport.verify(room / "out", eval=room / "eval.npz")


def slow_second(monkeypatch):
    """Let int8 seem slower than float, by the fault of the second product."""
    time_it = RecallingBench.time

    def time(self, product):
        speed = 0.5 if "MatMul2" in product.quantized else 2.0
        update = {"speedup": speed, "speedup_low": speed, "speedup_high": speed}
        return time_it(self, product).model_copy(update=update)

    def blame(self, product, regions):
        return [Cost(1.0, 3.0 if "MatMul2" in region.nodes else 0.5) for region in regions]

    monkeypatch.setattr(RecallingBench, "time", time)
    monkeypatch.setattr(RecallingBench, "costs", blame)


def test_what_was_backed_off_for_its_speed_stays_in_float_without_measuring(room, monkeypatch):
    with monkeypatch.context() as patch:
        slow_second(patch)
        result = build(room, "slow", settings=())
    assert [off.nodes for off in result.backed_off] == [("MatMul2",)]
    assert "slower" in result.backed_off[0].reason
    assert qexport.verify(room / "slow").same
    edit(room / "slow", lambda manifest: manifest["replay"].update(keep={}))
    assert verdicts(qexport.verify(room / "slow"))["model.onnx"] == "differs"  # so it is keep that does it


def test_what_was_backed_off_for_a_gate_replays_without_the_gate(room):
    result = build(room, "gated", settings=("gates.min_worst_cosine=0.99995",))
    assert result.backed_off
    assert qexport.verify(room / "gated").same


def test_a_build_without_any_data_replays(room):
    build(room, "half", recipe="float32", calib=None, eval=None)
    found = qexport.verify(room / "half")
    assert found.same


def test_kept_nodes_go_to_the_step_that_would_quantize_them_and_disabled_steps_do_not_count():
    recipe = override(load_recipe("int8"), ["quantize.keep=['a']", "gates.min_cosine=0.9", "observe.enabled=false"])
    enabled = [step.pass_ for step in recipe.step if step.enabled]
    again = replay_recipe(recipe, {enabled.index("quantize") + 1: ("b", "c")})
    kept = {step.pass_: step.options["keep"] for step in again.step if "keep" in step.options}
    assert kept == {"quantize": ["a", "b", "c"]}
    assert again.gates == type(again.gates)()
    assert (again.export.never_worse, again.export.engine) == (False, False)
    assert "observe" not in {step.pass_ for step in again.step if step.enabled}
    with pytest.raises(UsageError, match="no step 99"):
        replay_recipe(recipe, {99: ("b",)})


def test_a_manifest_that_does_not_say_how_can_only_be_checked(room):
    edit(room / "out", lambda manifest: manifest.pop("replay"))
    with pytest.raises(UsageError, match=r"does not say how to build it again.*build it again"):
        qexport.verify(room / "out")
    assert qexport.verify(room / "out", files=True).same


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda manifest: manifest["recipe"].update(colour="red"), "colour"),
        (lambda manifest: manifest["replay"].update(keep={"x": []}), "keep"),
        (lambda manifest: manifest["replay"].pop("model"), "model"),
        (lambda manifest: manifest["recipe"]["step"][0].update({"pass": "paint"}), "paint"),
    ],
)
def test_a_receipt_in_words_of_another_version_is_told_as_such(room, change, told):
    edit(room / "out", change)
    with pytest.raises(UsageError, match=told):
        qexport.verify(room / "out")


@pytest.mark.parametrize("files", [{"model.onnx": 3}, {"model.onnx": {}}, {"model.onnx": {"digest": 3}}])
def test_a_manifest_that_is_damaged_is_told(room, files):
    edit(room / "out", lambda manifest: manifest.update(files=files))
    with pytest.raises(IntegrityError, match="not one of qexport's"):
        qexport.verify(room / "out")


def test_a_folder_without_a_manifest_and_names_that_lead_out_are_refused(room, tmp_path):
    with pytest.raises(UnsafeInput, match="no manifest"):
        qexport.verify(tmp_path)
    record = {"digest": "sha256:0", "bytes": 1}
    edit(room / "out", lambda manifest: manifest["files"].update({"../calib.npz": record}))
    with pytest.raises(UnsafeInput, match="leaves the folder"):
        qexport.verify(room / "out", files=True)


def test_an_export_is_checked_but_not_replayed(made, tmp_path):
    exported(made / "model.onnx", tmp_path / "portable")
    assert qexport.verify(tmp_path / "portable", files=True).same
    with pytest.raises(UsageError, match="exports cannot be replayed"):
        qexport.verify(tmp_path / "portable")


def test_other_tools_and_another_processor_are_told(room):
    def change(manifest):
        manifest["tools"]["onnxruntime"] = "0.1"
        manifest["tools"]["abacus"] = "1"
        manifest["replay"]["processor"] = "x86_64 mmx"

    edit(room / "out", change)
    notes = qexport.verify(room / "out").notes
    assert any(note.startswith("onnxruntime was 0.1, is ") for note in notes)
    assert "abacus was 1, is not there" in notes
    assert any(note.startswith("the processor was x86_64 mmx, is ") for note in notes)


def test_weights_beside_the_model_and_tokenizers_are_replayed_and_reports_are_not():
    names = ("model.onnx", "model.onnx.data", "tokenizer.json", "config.json")
    assert all(map(is_replayed, names))
    assert not any(map(is_replayed, ("result.json", "report.md", "README.md", "engine.plan", "model.onnxx")))


# ---------------------------------------------------------------- the command


def test_the_command_tells_file_by_file_and_leaves_with_0(room, capsys):
    code, out, err = call(capsys, "verify", str(room / "out"))
    assert code == 0, err
    assert "model.onnx" in out
    assert "built again" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80


def test_a_folder_that_is_not_there_is_exit_code_2(tmp_path, capsys):
    code, _, err = call(capsys, "verify", str(tmp_path / "nowhere"))
    assert (code, "no such folder" in err) == (2, True)
    tmp_path.joinpath("empty").mkdir()
    assert call(capsys, "verify", str(tmp_path / "empty"))[0] == 4


def test_the_command_leaves_with_11_where_bytes_differ(room, capsys):
    def leave_out(manifest):
        step = next(step for step in manifest["recipe"]["step"] if step["pass"] == "quantize")
        step["keep"] = ["MatMul2"]

    edit(room / "out", leave_out)
    code, out, err = call(capsys, "verify", str(room / "out"))
    assert code == 11
    assert "found instead" in out
    assert "built again, it is not the same: model.onnx" in err
    code, out, _ = call(capsys, "verify", str(room / "out"), "--json")
    told = json.loads(out)
    assert (code, told["same"], told["schema"]) == (11, False, "qexport.verify/1")


def test_the_command_checks_files_alone_in_no_time(room, capsys):
    code, out, _ = call(capsys, "verify", str(room / "out"), "--files", "--json")
    assert (code, json.loads(out)["replayed"]) == (0, False)
