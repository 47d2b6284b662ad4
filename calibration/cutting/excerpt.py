"""A few samples that stand for many, for what runs the model whole many times."""

from __future__ import annotations

from itertools import islice

from qexport.calibration.reading.data import Dataset, Sample

LOOKED_AT = 64


def spread(data: Dataset, count: int) -> list[Sample]:
    """At most ``LOOKED_AT`` samples, evenly from all over the first ``count``: files tend to begin with one kind.

    What comes after ``count`` is held out: builds are judged on it.
    """
    count = min(count, len(data))
    step = max(1, count // LOOKED_AT)
    return list(islice(data, 0, min(count, step * LOOKED_AT), step))
