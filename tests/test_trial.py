"""Trials of a quantizer say what rounding by hand says, about rows that its range was not taken from."""

import numpy as np
import onnx_ir as ir
import pytest

from qexport.passes.folding.activation import Activation
from qexport.passes.folding.trial import Trial
from qexport.passes.numbers.weights import quantize_weight
from qexport.passes.smooth import migrate


def by_definition(rows, weight, kind):
    """What a trial of no scales says: each half of the rows in the best of the clips that the other half allows for."""
    e4m3 = ir.DataType.FLOAT8E4M3FN.numpy()
    limit, total = np.float32(127 if kind == "int8" else 448), 0.0
    if kind == "int8":
        codes, steps = quantize_weight(weight, 1)
        stored, shares = codes.astype(np.float32) * steps, (1.0, 0.85, 0.7, 0.55)
    else:
        steps = np.abs(weight).max(axis=0) / limit
        stored = (weight / steps).astype(e4m3).astype(np.float32) * steps
        shares = (1.0, 0.85, 0.7, 0.55, *(2.0 ** (i / 8) for i in range(1, 8)))
    for seen, x in ((rows[::2], rows[1::2]), (rows[1::2], rows[::2])):
        found = []
        for share in shares:
            step = np.float32(float(np.abs(seen).max()) * 1.1 * share / float(limit))
            if kind == "int8":
                read = np.clip(np.rint(x / step), -128, 127) * step
            else:
                read = np.clip(x / step, -limit, limit).astype(e4m3).astype(np.float32) * step
            noise = np.square(read @ stored - x @ weight).sum(axis=1).astype(np.float64)
            power = np.square(x @ weight).sum(axis=1).mean()
            found.append((noise.mean() + np.sort(noise)[-max(1, int(0.02 * len(x))) :].mean()) / power)
        total += min(found)
    return total / 2


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("outlier", [1, 40])
def test_a_trial_rounds_to_the_numbers_that_it_is_given(kind, outlier):
    rng = np.random.default_rng(5)
    rows, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((128, 48), (48, 32)))
    rows[:, 3] *= outlier
    trial = Trial(Activation(-1, rows.min(0), rows.max(0), rows), [weight], 1.1, kind)
    assert trial.error(np.ones_like) == pytest.approx(by_definition(rows, weight, kind), rel=1e-6)


def test_what_suits_only_the_rows_that_were_seen_is_not_smoothed():
    rows = np.random.default_rng(3).standard_normal((64, 48)).astype(np.float32)
    weight = np.random.default_rng(4).standard_normal((48, 32)).astype(np.float32)
    most = np.abs(weight).max(axis=1).astype(np.float64)
    trial = Trial(Activation(-1, rows.min(0), rows.max(0), rows), [weight], 1.1)
    strong = trial.error(lambda reach: migrate(reach.astype(np.float64), most, 0.9))
    assert strong > trial.error(np.ones_like) * 1.5
