"""Functions: unique, not recursive, and not a small file that expands into a huge graph."""

from __future__ import annotations

from qexport.errors import ModelInvalid, ResourceExhausted
from qexport.exporter.admit.graphs import Needs, find_cycle, topological
from qexport.exporter.admit.subject import Subject, quoted, standard

Key = tuple[str, str, str]  # domain, name, overload


def known(subject: Subject) -> dict[Key, int]:
    """Functions of the model to their index in ``bodies``, which lists them right after the graph."""
    keys: dict[Key, int] = {}
    for index, function in enumerate(subject.model.functions, start=1):
        key = (standard(function.domain), function.name, function.overload)
        if key in keys:
            raise ModelInvalid(f"function {quoted(function.name)} of domain {quoted(function.domain)} is there twice")
        keys[key] = index
    return keys


def check_functions(subject: Subject) -> None:
    """Raise ``ModelInvalid`` for recursion and deep nesting, ``ResourceExhausted`` for too many nodes when expanded."""
    keys = known(subject)
    if not keys:
        return
    calls, sizes = _calls(subject, keys)
    needs: Needs = [sorted(set(called)) for called in calls]
    cycle = find_cycle(needs)
    names = ["the graph", *(quoted(function.name) for function in subject.model.functions)]
    if cycle:
        path = " -> ".join(names[index] for index in reversed(cycle[:8]))
        raise ModelInvalid(f"functions call each other in a circle: {path}")
    depths = [0] * len(needs)
    for index in topological(needs)[0]:
        depths[index] = 1 + max((depths[called] for called in needs[index]), default=-1)
        sizes[index] += sum(sizes[called] for called in calls[index])
        if depths[index] > subject.limits.max_nesting:
            raise ModelInvalid(f"function calls nest more than {subject.limits.max_nesting} deep", where=names[index])
        if sizes[index] > subject.limits.max_nodes:
            raise ResourceExhausted(
                f"the function calls expand to more than {subject.limits.max_nodes} nodes", where=names[index]
            )


def _calls(subject: Subject, keys: dict[Key, int]) -> tuple[list[list[int]], list[int]]:
    """Per function (the graph is number 0) what it calls, once per call, subgraphs included; and its own nodes."""
    calls: list[list[int]] = [[] for _ in range(len(keys) + 1)]
    sizes = [0] * len(calls)
    home: list[int] = []
    for index, body in enumerate(subject.bodies):
        home.append(index if body.parent is None else home[body.parent])
        if not body.runs:
            continue
        sizes[home[index]] += len(body.proto.node)
        for node in body.proto.node:
            called = keys.get((standard(node.domain), node.op_type, node.overload))
            if called is not None:
                calls[home[index]].append(called)
    return calls, sizes
