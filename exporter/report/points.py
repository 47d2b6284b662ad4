"""Quality against time and size: float, everything that was tried, the result, and what more float would bring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from qexport.exporter.outcome.result import Result
from qexport.exporter.precision.tried import loss_of
from qexport.exporter.report.values import Node, Point

ESTIMATES = 6


def points(result: Result, nodes: Sequence[Node], constants: int) -> tuple[Point, ...]:
    """Return the points, most int8 first within each kind; none where quality was not measured.

    Args:
        result: What was measured.
        nodes: The rows of the table.
        constants: Bytes of the result's initializers, which sizes of what was tried are told in.
    """
    loss, unit = loss_of(result.quality)
    if loss is None:
        return ()
    latency = None if result.latency is None or result.latency.foreign else result.latency
    many = sum(node.state == "quantized" for node in nodes)
    stayed = sum(node.state == "kept" for node in nodes)  # from the start, in everything that was tried
    kept = stayed + sum(node.state == "backed off" for node in nodes)
    around = result.bytes_after - constants  # the graph itself
    found = [
        _point("float", many + kept, 0.0, unit, result.bytes_before),
        *(
            Point(
                f"{stayed + t.kept} in float",
                stayed + t.kept,
                t.loss,
                t.unit,
                t.bytes + around,
                t.ms,
                t.speedup,
                True,
                t.fits,
                False,
                False,
            )
            for t in sorted(result.tried, key=lambda t: t.kept)
        ),
        replace(_point("result", kept, loss, unit, result.bytes_after), chosen=True),
    ]
    if latency is not None:
        found[0] = replace(found[0], ms=latency.reference_ms, speedup=1.0)
        found[-1] = replace(found[-1], ms=latency.result_ms, speedup=latency.speedup)
    else:
        found = [replace(point, ms=None, speedup=None) for point in found]
    found += _estimates(found[-1], nodes)
    return tuple(replace(point, pareto=_is_best(point, found)) for point in found)


def _point(label: str, kept: int, loss: float, unit: str, size: int) -> Point:
    return Point(label, kept, loss, unit, size, None, None, True, True, False, False)


def _estimates(result: Point, nodes: Sequence[Node]) -> Iterator[Point]:
    """What to expect of leaving more layers in float, the worst first: their errors hardly correlate, so they add up.

    The loss is taken to fall with the sum of the errors that are left. Weights are as large as in the float model, or
    as much smaller as those are that the result has in float.
    """
    layers = sorted((n for n in nodes if n.state == "quantized" and n.error is not None), key=lambda n: -(n.error or 0))
    whole = sum(node.error or 0.0 for node in layers)
    if result.loss is None or result.loss <= 0 or whole <= 0:
        return
    shrunk = _shrunk(nodes)
    counts = sorted({max(1, round(len(layers) * 2.0**-step)) for step in range(ESTIMATES)})
    for count in counts:
        left = sum(node.error or 0.0 for node in layers[count:])
        more = sum(max(round(shrunk * node.bytes_before) - node.bytes_after, 0) for node in layers[:count])
        yield replace(
            result,
            label=f"{count} more in float",
            kept=result.kept + count,
            loss=result.loss * left / whole,
            bytes=result.bytes + more,
            ms=None,
            speedup=None,
            measured=False,
            chosen=False,
        )


def _shrunk(nodes: Sequence[Node]) -> float:
    """What is left of a byte of weights that stay in float: half of it where they are stored in half precision."""
    rest = [node for node in nodes if node.state not in ("quantized", "gone")]
    before = sum(node.bytes_before for node in rest)
    return min(sum(node.bytes_after for node in rest) / before, 1.0) if before else 1.0


def _is_best(point: Point, others: Sequence[Point]) -> bool:
    """Whether nothing measured is at least as good in all that is known of both, and better in one."""
    if not point.measured or point.loss is None:
        return False
    timed = all(other.ms is not None for other in others if other.measured)
    mine = _costs(point, timed=timed)
    rivals = [_costs(o, timed=timed) for o in others if o.measured and o.unit == point.unit and o.loss is not None]
    return not any(r != mine and all(a <= b for a, b in zip(r, mine, strict=True)) for r in rivals)


def _costs(point: Point, *, timed: bool) -> tuple[float, ...]:
    """Loss, size, and time where all have one."""
    loss = max(point.loss or 0.0, 0.0)
    return (loss, point.bytes, point.ms or 0.0) if timed else (loss, point.bytes)
