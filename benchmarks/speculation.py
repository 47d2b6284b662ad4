"""Decoding ahead: every way against plain decoding and against transformers, prompt by prompt in one run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure

import qexport
from qexport.runtime.accounting.records import PrefillRecord, Run
from qexport.runtime.accounting.stats import account
from qexport.runtime.benchmarking.interleaved import Decoded, Timing, Way, compare, generator_way, interleave
from qexport.runtime.generation.generator import GenerateOptions, Generator, open_generator
from qexport.runtime.generation.models import UNROLL_AFTER
from qexport.runtime.generation.stops import Stop
from qexport.runtime.session import SessionOptions

PAIRS = {
    "draft -> target": ("draft", "target"),
    "pair-draft -> pair-target": ("pair-draft", "pair-target"),
    "pair-draft -> pair-target, int8": ("pair-draft", "pair-target, int8"),
    "stories260k -> stories3m": ("stories260k", "stories3m"),
}
INT8 = ", int8"
AHEAD = (1, 2, 3, 4, 5, 6, 8)
PEERS = ("plain", "assisted", "assisted-2", "assisted-3", "assisted-4", "lookup-3", "lookup-10")
PROMPTS, TOKENS, LENGTH, STRIDE = 64, 128, 48, 110
SHUFFLE = 37  # has no factor in common with numbers of prompts
COMPARED = 12  # prompts that transformers decodes too
IDENTICAL = 200  # prompts of the last pair that are held against plain decoding
ONE = SessionOptions(threads=1, spin=False)

NOTE = (
    f"Greedy, onnxruntime CPU, one thread, float32 but for the target of the third pair. {PROMPTS} prompts of {LENGTH} "
    f"tokens from held-out text, {TOKENS} tokens each, one at a time; all ways decode a prompt before the next one is "
    "decoded, the draft unrolled as after the first requests of a service. Speed: tokens per second, prompts included, "
    "over plain decoding (95 % of resamplings of prompts). `K = n`: always n tokens ahead; `auto`: as many as the "
    "measured curves and the acceptance so far say, copies from prompt and output where they pay. Overhead: time of "
    "rounds outside of onnxruntime: the rule, rollback, all of Python. Same: prompts with the tokens of plain "
    "decoding; an 8-bit target rounds activations, so that the order of a sum can move a whole step."
)
PEER_NOTE = (
    f"The first {COMPARED} of these prompts, decoded by transformers in a process beside it, in turn in the same run: "
    "plain, assisted generation by its defaults and with a constant number of tokens, prompt lookup. Same: prompts "
    "with the tokens of our plain decoding; near ties may fall to either side between two runtimes."
)


class Transformers:
    """The peer, in a process of its own that is asked by lines."""

    def __init__(self, target: Path, draft: Path) -> None:
        """Load both models."""
        command = [sys.executable, "-W", "ignore", str(measure.HERE / "speculation_peer.py"), str(target), str(draft)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self._answer()

    def __enter__(self) -> Transformers:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()

    def way(self, mode: str, prompts: Sequence[list[int]]) -> Way:
        """One of its modes."""

        def decode(number: int) -> Decoded:
            answer = self._ask({"mode": mode, "prompts": [prompts[number]], "tokens": TOKENS})
            return Decoded(tuple(answer["tokens"][0]), answer["seconds"], Run(PrefillRecord(0, 0, (LENGTH,)), ()))

        return Way(f"transformers {mode}", decode)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        print(json.dumps(request), file=self._child.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        answer: dict[str, Any] = json.loads(self._child.stdout.readline())
        return answer


def main() -> None:
    """Measure all pairs."""
    rows, peers = [], []
    for name, (draft, target) in PAIRS.items():
        with open_generator(exported(target), draft=exported(draft), options=GenerateOptions(session=ONE)) as loaded:
            assert loaded.draft is not None
            loaded.draft.note(UNROLL_AFTER, failed=False)  # as after the first requests of a service
            prompts = windows(loaded, PROMPTS)
            timings = interleave([*ways(loaded, prompts).values()], PROMPTS, 1)
            rows += [_row(name, timing, timings) for timing in timings]
            measure.report("speculation", rows, NOTE)
            if target.endswith(INT8):
                continue
            best = max(timings[1:], key=lambda timing: timing.tokens_per_second).way.name
            folders = (measure.SAMPLES / "decoder" / target, measure.SAMPLES / "decoder" / draft)
            with Transformers(*folders) as peer:
                ours = [one for one in ways(loaded, prompts).values() if one.name in ("plain", "auto", "lookup", best)]
                theirs = [peer.way(mode, prompts) for mode in PEERS]
                peers += _peer_rows(name, interleave([*ours, *theirs], COMPARED, 1))
                measure.report("speculation_peers", peers, f"{PEER_NOTE} {json.dumps(peer.versions)}")
            if name == list(PAIRS)[-1]:
                _demand_identical(loaded)


def exported(name: str) -> Path:
    """The portable graph of a sample, or what int8 makes of it."""
    folder = measure.WORK / "decoders" / name.replace(INT8, "-int8")
    if not (folder / "manifest.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(INT8):
            graph, text = exported(name.removesuffix(INT8)) / "model.onnx", measure.SAMPLES / "decoder/calibration.txt"
            options = qexport.BuildOptions(output=folder)
            qexport.build(graph, recipe="int8", calib=text, target="ort-cpu", options=options)
        else:
            qexport.export(measure.SAMPLES / "decoder" / name, output=folder)
    return folder


def windows(loaded: Generator, count: int) -> list[list[int]]:
    """Prompts from all over the held-out text, in no order."""
    ids = loaded.tokenizer.encode((measure.SAMPLES / "decoder/heldout.txt").read_text(encoding="utf-8"))
    stride = min(STRIDE, (len(ids) - LENGTH) // count)
    starts = [stride * (SHUFFLE * place % count) for place in range(count)]
    return [list(ids[start : start + LENGTH]) for start in starts]


def ways(loaded: Generator, prompts: Sequence[list[int]]) -> dict[str, Way]:
    """All of ours, which share what is loaded."""
    target, draft = loaded.target, loaded.draft
    found = {"plain": Generator(target, None, GenerateOptions(session=ONE, speculate="off", lookup=False))}
    for ahead in AHEAD:
        found[f"K = {ahead}"] = Generator(target, draft, GenerateOptions(session=ONE, speculate=ahead, lookup=False))
    found["auto, draft"] = Generator(target, draft, GenerateOptions(session=ONE, lookup=False))
    found["auto"] = Generator(target, draft, GenerateOptions(session=ONE))
    found["lookup"] = Generator(target, None, GenerateOptions(session=ONE))
    stop = Stop(tokens=TOKENS, eos=False)
    return {name: generator_way(name, generator, prompts, None, stop) for name, generator in found.items()}


def _row(pair: str, timing: Timing, timings: Sequence[Timing]) -> dict[str, Any]:
    ratio, stats = compare(timing, timings[0]), account(timing.runs)
    return {
        "pair": pair,
        "way": timing.way.name,
        "tokens/s": f"{timing.tokens_per_second:.0f}",
        "speed": f"{ratio.value:.2f}x ({ratio.low:.2f} .. {ratio.high:.2f})",
        "tokens per call": f"{stats.tokens_per_call:.2f}",
        "taken, %": " ".join(f"{found.proposer} {100 * found.rate:.0f}" for found in stats.proposers),
        "overhead, %": f"{100 * stats.overhead:.1f}",
        "same": f"{timing.same(timings[0])}/{PROMPTS}",
    }


def _peer_rows(pair: str, timings: Sequence[Timing]) -> list[dict[str, Any]]:
    theirs = [timing for timing in timings if timing.way.name.startswith("transformers")]
    best = max(theirs, key=lambda timing: timing.tokens_per_second)
    return [
        {
            "pair": pair,
            "way": timing.way.name,
            "tokens/s": f"{timing.tokens_per_second:.0f}",
            "over their best": f"{(ratio := compare(timing, best)).value:.2f}x ({ratio.low:.2f} .. {ratio.high:.2f})",
            "same": f"{timing.same(timings[0])}/{COMPARED}",
        }
        for timing in timings
    ]


def _demand_identical(loaded: Generator) -> None:
    """Greedy tokens with K = 4 are those of plain decoding, on more prompts."""
    prompts = windows(loaded, IDENTICAL)
    known = ways(loaded, prompts)
    timings = interleave([known["plain"], known["K = 4"]], IDENTICAL, 1)
    same, stats = timings[1].same(timings[0]), account(timings[1].runs)
    row = {"prompts": IDENTICAL, "identical": same, "tokens per call": f"{stats.tokens_per_call:.2f}"}
    measure.report("speculation_identity", [row], f"stories260k -> stories3m, K = 4, greedy, {TOKENS} tokens each.")


if __name__ == "__main__":
    main()
