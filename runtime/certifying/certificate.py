"""What was found out: every check with its numbers, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qexport.runtime.certifying.gtest import Fit, holm, power

SCHEMA = "qexport.certificate/1"
NUMBERS = "numbers"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold.

    Attributes:
        group: What it is about: ``joint``, ``seeds``, ``outputs``, ``numbers``, ``decisions``, ``greedy``, ``sound``.
        name: Which one of the group.
        passed: Whether it holds.
        told: The numbers in words.
        p: Of a statistical test; ``None`` where there is nothing to chance.
        samples: What it looked at.
        finds: The total variation from which on it would have failed in 99 of 100 cases; for pairs of numbers, of
            their joint distribution in groups. ``None`` where that is not known.
        details: More numbers, by name.
    """

    group: str
    name: str
    passed: bool
    told: str
    p: float | None = None
    samples: int = 0
    finds: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Test:
    """A test before it is judged, which takes all of them.

    Attributes:
        group: As :class:`Check` has it.
        name: The same.
        fit: What came out; without degrees of freedom where its power is not known.
        details: More numbers.
    """

    group: str
    name: str
    fit: Fit
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Certificate:
    """The verdict on a pair.

    Attributes:
        target: Folder and digest of the model.
        draft: The same; ``None`` where copies alone were certified.
        level: The chance of a false alarm, of all tests together.
        checks: In the order in which they were made.
        options: What was asked for.
        seconds: How long it took.
    """

    target: dict[str, str]
    draft: dict[str, str] | None
    level: float
    checks: tuple[Check, ...]
    options: dict[str, Any]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that do not."""
        return tuple(check for check in self.checks if not check.passed)

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        head = {"schema": SCHEMA, "passed": self.passed, "target": self.target, "draft": self.draft}
        asked = {"level": self.level, "options": self.options, "seconds": round(self.seconds, 1)}
        return {**head, **asked, "checks": [asdict(check) for check in self.checks]}

    def lines(self) -> list[str]:
        """As people read it; of numbers that are independent one line is enough."""
        quiet = [check for check in self.checks if check.group == NUMBERS and check.passed]
        checks = [check for check in self.checks if check not in quiet]
        width = max(len(check.name) for check in checks)
        rows = [f"{'ok  ' if check.passed else 'FAIL'} {check.name:{width}}  {check.told}" for check in checks]
        if quiet:
            lowest = min(quiet, key=lambda check: 1.0 if check.p is None else check.p)
            rows.append(f"ok   {len(quiet)} tests of numbers; the lowest: {lowest.name}, {lowest.told}")
        draft = "no draft" if self.draft is None else f"draft {self.draft['path']}"
        head = f"target {self.target['path']}, {draft}"
        failed = len(self.failed)
        verdict = f"{failed} of {len(self.checks)} checks fail" if failed else f"all {len(self.checks)} checks hold"
        risk = f"a sound runtime fails with a chance of {self.level:g}"
        return [head, *rows, f"{verdict} in {self.seconds:.0f} s; {risk}"]


def judge(tests: Sequence[Test], level: float) -> list[Check]:
    """Judge all tests at once, so that together they give a false alarm with the chance ``level`` at most."""
    rejected = holm([test.fit.p for test in tests], level)
    return [_judged(test, not wrong, level / len(tests)) for test, wrong in zip(tests, rejected, strict=True)]


def _judged(test: Test, passed: bool, level: float) -> Check:
    fit = test.fit
    finds = power(fit.freedom, fit.samples, level) if fit.freedom else None
    told = f"p = {fit.p:.2g}, {fit.samples} samples"
    if fit.impossible:
        told += f", {fit.impossible} of them cannot be"
    if finds is not None:
        told += f", finds deviations of {finds:.1%}"
    numbers = {"statistic": fit.statistic, "freedom": fit.freedom, "impossible": fit.impossible, **test.details}
    return Check(test.group, test.name, passed, told, fit.p, fit.samples, finds, numbers)
