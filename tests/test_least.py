import numpy as np
import pytest
from helpers import call, save_model

from qexport.calibration.least import check_least
from qexport.errors import UsageError
from qexport.exporter.recipe import instantiate
from qexport.exporter.recipe_files import load_recipe, override
from qexport.exporter.steps import PASSES

COUNTS = [(name, "samples") for name in ("observe", "calibrate", "extremes", "correct-bias", "gptq", "awq", "adaround")]
COUNTS += [("triage", "excerpt"), ("adaround", "iterations")]


@pytest.mark.parametrize(("step", "option"), COUNTS)
def test_a_count_below_one_is_a_usage_error_that_names_option_value_and_default(step, option):
    cls = PASSES[step]
    for bad in (-1, 0):
        with pytest.raises(UsageError, match=f"{option} is {bad}, expected 1 or more") as caught:
            cls(**{option: bad})
        assert caught.value.where == f"{step}.{option}"
        assert caught.value.hint == f"leave it out for {getattr(cls(), option)}"
    assert getattr(cls(**{option: 1}), option) == 1


@pytest.mark.parametrize("count", [-1, 0])
@pytest.mark.parametrize("step", ["calibrate", "extremes"])
@pytest.mark.parametrize("judged", [True, False])
def test_a_build_is_refused_before_it_reads_data(tmp_path, capsys, step, count, judged):
    model = save_model(tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", np.ones((8, 32), np.float32))
    options = ["--calib", str(tmp_path / "x.npy"), "--set", f"{step}.samples={count}", "-o", str(tmp_path / "out")]
    options += ["--eval", str(tmp_path / "x.npy")] if judged else []
    code, _, told = call(capsys, "build", str(model), *options)
    assert code == 2
    assert f"samples is {count}, expected 1 or more" in told
    assert "hint: leave it out for 512" in told


@pytest.mark.parametrize("setting", ["calibrate.samples=-1", "extremes.samples=0", "triage.excerpt=-3"])
def test_a_recipe_is_refused_before_it_runs(setting):
    recipe = override(load_recipe("int8"), [setting])
    with pytest.raises(UsageError, match="expected 1 or more") as caught:
        instantiate(recipe, {"data": [], "advance": lambda: None})
    assert "step" in caught.value.where


def test_each_option_has_a_least_value_of_its_own():
    step = PASSES["gptq"]()
    check_least("gptq", step, samples=128, group=128)
    with pytest.raises(UsageError, match=r"gptq\.group: group is 128, expected 129 or more \(leave it out for 128\)"):
        check_least("gptq", step, samples=128, group=129)
