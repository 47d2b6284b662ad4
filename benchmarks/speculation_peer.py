"""transformers decoding ahead, in a process of its own: ``speculation_peer.py TARGET DRAFT``, one thread.

Reads requests as lines of JSON, ``{"mode": NAME, "prompts": [[ids]], "tokens": N}``, and answers each with its seconds
and tokens. Modes: ``plain``, ``assisted`` (its defaults), ``assisted-K`` (K tokens ahead, always), ``lookup-N``
(prompt lookup). Greedy, in a single sequence, which is all that its assisted generation takes.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM


def main() -> None:
    """Load both and answer until there are no more requests."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    target, draft = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in sys.argv[1:3])
    for model in (target, draft):
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    print(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        chosen = settings(asked["mode"], draft)
        started, found = time.perf_counter(), []
        with torch.inference_mode():
            for prompt in asked["prompts"]:
                ids = torch.tensor([prompt])
                out = target.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=asked["tokens"],
                    **chosen,
                )
                found.append(out[0, len(prompt) :].tolist())
        print(json.dumps({"seconds": time.perf_counter() - started, "tokens": found}), flush=True)


def settings(mode: str, draft: Any) -> dict[str, Any]:
    """What ``generate`` is told."""
    name, _, count = mode.partition("-")
    if name == "plain":
        return {}
    if name == "lookup":
        return {"prompt_lookup_num_tokens": int(count)}
    config = draft.generation_config
    if count:
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = int(count), "constant"
        config.assistant_confidence_threshold = 0.0
    else:
        fresh = transformers.GenerationConfig()
        for key in ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"):
            setattr(config, key, getattr(fresh, key))
    return {"assistant_model": draft}


if __name__ == "__main__":
    main()
