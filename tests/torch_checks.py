"""What tests of exports from torch share."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from helpers import session


def check(source, tolerance=2e-6):
    """The graph is valid and says what the module says, at every size that was tried."""
    proto = ir.to_proto(source.model)
    onnx.checker.check_model(proto, full_check=True)
    running = session(source.model)
    names = [output.name for output in running.get_outputs()]
    for feeds in source.trials:
        truth = source.reference(feeds)
        assert list(truth) == names
        for name, found in zip(names, running.run(None, feeds), strict=True):
            assert found.shape == truth[name].shape
            np.testing.assert_allclose(found, truth[name], rtol=tolerance, atol=tolerance)
    return proto
