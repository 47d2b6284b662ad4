"""Copies instead of a draft: prompt lookup and references on text that repeats itself, and on text that does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import measure
from speculation import ONE, exported

from qexport.runtime.accounting.stats import account
from qexport.runtime.benchmarking.interleaved import Timing, compare, generator_way, interleave
from qexport.runtime.generation.generator import GenerateOptions, Generator, open_generator
from qexport.runtime.generation.prompt_files import read_prompts_file
from qexport.runtime.generation.prompts import Prompt
from qexport.runtime.generation.stops import Stop
from qexport.runtime.sampling.settings import Sampling

TARGETS = ("target", "pair-target")
GREEDY, DRAWN = Sampling(), Sampling(temperature=1.0, seed=1)
SETS = (
    ("edits, with references", "edit-{}", True, GREEDY),
    ("edits, without", "edit-{}", False, GREEDY),
    ("tables in code", "copy", False, GREEDY),
    ("free text", "free", False, GREEDY),
    ("free text, temperature 1", "free", False, DRAWN),
)
TOKENS, ROUNDS = 128, 3
STOP = Stop(tokens=TOKENS, eos=False)

NOTE = (
    f"onnxruntime CPU, one thread, float32, no draft; {TOKENS} tokens a prompt, one at a time, {ROUNDS} rounds in "
    "which both ways decode a prompt before the next. Copies come from prompt and output, and from references where "
    "there are some: what the target said before the prompt was edited. How far to copy, and when to stop, is left to "
    "the runtime. Speed: tokens per second over plain decoding (95 % of resamplings of prompts)."
)


def main() -> None:
    """Measure all sets on both targets."""
    rows = []
    for target in TARGETS:
        with open_generator(exported(target), options=GenerateOptions(session=ONE)) as loaded:
            plain = Generator(loaded.target, None, GenerateOptions(session=ONE, speculate="off", lookup=False))
            for name, file, references, sampling in SETS:
                prompts = _prompts(file.format(target), references=references)
                both = {"plain": plain, "copies": loaded}.items()
                ways = [generator_way(way, each, prompts, sampling, STOP) for way, each in both]
                rows.append(_row(target, name, interleave(ways, len(prompts), ROUNDS)))
                measure.report("copying", rows, NOTE)


def _prompts(file: str, *, references: bool) -> list[Prompt]:
    found = read_prompts_file(measure.SAMPLES / "prompts" / f"{file}.jsonl")
    return [one if references else Prompt(one.text) for one in found]


def _row(target: str, name: str, timings: Sequence[Timing]) -> dict[str, Any]:
    plain, copies = timings
    ratio, stats = compare(copies, plain), account(copies.runs)
    return {
        "target": target,
        "prompts": f"{name} ({len(plain.decoded[0])})",
        "plain, tokens/s": f"{plain.tokens_per_second:.0f}",
        "copies, tokens/s": f"{copies.tokens_per_second:.0f}",
        "speed": f"{ratio.value:.2f}x ({ratio.low:.2f} .. {ratio.high:.2f})",
        "tokens per call": f"{stats.tokens_per_call:.2f}",
        "taken, %": " ".join(f"{found.proposer} {100 * found.rate:.0f}" for found in stats.proposers),
        "same": f"{copies.same(plain)}/{len(plain.decoded[0])}",
    }


if __name__ == "__main__":
    main()
