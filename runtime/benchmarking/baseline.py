"""What a request took, held against plain decoding of the same prompts and against the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qexport.runtime.accounting.stats import Stats, account
from qexport.runtime.accounting.utilization import find_known
from qexport.runtime.generation.batches import Batch
from qexport.runtime.generation.generator import Generator
from qexport.runtime.generation.prompts import Prompt, Text
from qexport.runtime.generation.stops import Stop
from qexport.runtime.sampling.settings import Sampling


def account_with_baseline(
    generator: Generator,
    batch: Batch,
    prompts: Sequence[Text | Prompt],
    sampling: Sampling | None = None,
    stop: Stop | None = None,
) -> Stats:
    """Account for a request that has ended: measures the machine, and decodes a batch of its prompts plainly.

    Args:
        generator: Who answered it.
        batch: The request.
        prompts: Its prompts.
        sampling: How its tokens were chosen.
        stop: Where its outputs end.
    """
    target, draft = generator.target.profile(), None if generator.draft is None else generator.draft.profile()
    known = None if target is None else find_known(target, draft)
    if generator.options.speculate == "off":
        return account(batch.runs, known)
    plain = Generator(generator.target, None, replace(generator.options, speculate="off"))
    with plain.batch(prompts[: generator.options.batch], sampling, stop) as other:
        for _ in other:
            pass
    return account(batch.runs, known, account(other.runs).tokens_per_second)
