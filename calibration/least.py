"""The check of options that count something, shared by the passes that look at data."""

from __future__ import annotations

from qexport.errors import UsageError
from qexport.passes.base import Pass


def check_least(step: str, options: Pass, **least: int) -> None:
    """Raise ``UsageError`` for an option below the least that it may be, naming it, what it is and the default.

    Args:
        step: What recipes call the pass.
        options: The pass.
        least: The smallest value of each option to check.
    """
    for name, bound in least.items():
        told = getattr(options, name)
        if told < bound:
            default = options.options()[name].default
            raise UsageError(
                f"{name} is {told}, expected {bound} or more",
                where=f"{step}.{name}",
                hint=f"leave it out for {default}",
            )
