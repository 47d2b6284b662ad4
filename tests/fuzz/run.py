"""Fuzz the targets with atheris: ``python -m fuzz.run [--seconds N] [TARGET ...]``, from an environment that has it.

Inputs that reach new code are kept in ``build/fuzz/TARGET``, inputs that break a target in ``build/fuzz/found``; any of
these ends the run with an error. To see one again: ``python -m fuzz.run --again FILE TARGET``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build/fuzz"
TARGETS = ("admit", "recipe")


def main() -> int:
    """Run each target in a process of its own, as one that crashes takes its process along."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("targets", nargs="*", default=TARGETS, metavar="TARGET")
    asked.add_argument("--seconds", type=int, default=600, help="how long each target is fuzzed")
    asked.add_argument("--again", type=Path, help="run the target on this file alone, without the fuzzer")
    asked.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    told = asked.parse_args()
    if told.again is not None:
        importlib.import_module(f"fuzz.{told.targets[0]}_target").one_input(told.again.read_bytes())
        return 0
    if told.inside:
        return fuzz(told.targets[0], told.seconds)
    before, failed = found(), False
    for target in told.targets:
        command = [sys.executable, "-m", "fuzz.run", target, "--seconds", str(told.seconds), "--inside"]
        failed |= subprocess.run(command).returncode != 0
    new = sorted(found() - before)
    print(f"{len(new)} inputs break a target" + "".join(f"\n  {path}" for path in new))  # noqa: T201 it is a program
    return 1 if new or failed else 0


def found() -> set[Path]:
    """Inputs that broke a target."""
    return set((BUILD / "found").glob("*-*"))


def keeping(target: str, one_input: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """The target; an input that raises is written down, which the fuzzer does for those that kill or hang alone."""

    def kept(data: bytes) -> None:
        try:
            one_input(data)
        except BaseException:
            (BUILD / "found" / f"{target}-raises-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
            raise

    return kept


def fuzz(target: str, seconds: int) -> int:
    """Fuzz one target in this process; does not return while it runs."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["qexport", "tomllib"]):
        module = importlib.import_module(f"fuzz.{target}_target")
    if hasattr(module, "MOST_SECONDS"):
        module.MOST_SECONDS *= 5  # counting takes time
    kept = BUILD / target
    for folder in (kept, BUILD / "found"):
        folder.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={seconds}", "-rss_limit_mb=2048", "-timeout=10", "-max_len=8192"]
    told = [f"-artifact_prefix={BUILD}/found/{target}-", "-print_final_stats=1", "-verbosity=1"]
    atheris.Setup(
        [sys.argv[0], str(kept), str(HERE / "corpus" / target), *limits, *told], keeping(target, module.one_input)
    )
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
