"""A training loop that stops and goes on: everything that a step depends on is in the checkpoint or in the plan.

Hidden matrices move by Muon (K. Jordan et al., *Muon: An optimizer for hidden layers in neural networks*, 2024; scaled
to AdamW's step as in J. Liu et al., *Muon is Scalable for LLM Training*, 2025, eq. 4), embeddings and norms by AdamW:
a small budget of tokens goes further so. The rate warms up linearly and falls along a cosine; sequences start short,
where a token costs least, and end at the full context.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from pair.corpus import Ids

WINDOW = 1024
"""Tokens that stay together when an epoch is shuffled; every sequence length divides it."""


@dataclass(frozen=True)
class Plan:
    """How long to train, in ``minutes`` or in ``tokens``, and how."""

    minutes: float | None = None
    tokens: int | None = None
    batch: int = 4 * WINDOW
    """Tokens a step, a multiple of the window."""
    rate: float = 3e-3
    warmup: float = 0.03
    """Share of the budget in which the rate rises."""
    decay: float = 0.1
    lengths: tuple[tuple[float, int], ...] = ((0.0, 256), (0.6, 512), (0.9, 1024))
    """From which share of the budget on sequences have which length."""
    seed: int = 0

    def progress(self, state: State) -> float:
        """Which share of the budget is spent, 1 at the end."""
        spent = state.tokens / self.tokens if self.tokens else state.seconds / (60 * (self.minutes or 1))
        return min(1.0, spent)

    def factor(self, progress: float) -> float:
        """What the rate is multiplied with: a ramp, then half a cosine down to 1 %."""
        if progress < self.warmup:
            return max(0.01, progress / self.warmup)
        along = (progress - self.warmup) / (1 - self.warmup)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * along)) / 2

    def length(self, progress: float) -> int:
        """Tokens in a sequence."""
        return max(length for start, length in self.lengths if progress >= start)


@dataclass
class State:
    """How far a training has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    """Mean cross-entropy of the last step, nats per token."""


class Windows:
    """Batches of a corpus, each a function of seed and step alone.

    An epoch joins the documents in a new order, cuts the stream into windows behind a random offset, and shuffles them.
    """

    def __init__(self, documents: Sequence[Ids], batch: int, seed: int):
        self._documents, self._count, self._seed = documents, batch // WINDOW, seed
        size = sum(map(len, documents))
        self.steps = (size - 2 * WINDOW) // WINDOW // self._count
        if self.steps < 1:
            raise ValueError(f"{size} tokens of text do not fill a batch of {batch}")
        self._epoch, self._windows = -1, np.empty((0, WINDOW + 1), np.int64)

    def batch(self, step: int) -> Ids:
        """Ids [windows, WINDOW + 1]; the last of a row is a label only."""
        epoch, index = divmod(step, self.steps)
        if epoch != self._epoch:
            self._epoch, self._windows = epoch, self._shuffle(np.random.default_rng([self._seed, epoch]))
        return self._windows[index * self._count : (index + 1) * self._count]

    def _shuffle(self, random: np.random.Generator) -> Ids:
        stream = np.concatenate([self._documents[i] for i in random.permutation(len(self._documents))])
        stream = stream[random.integers(WINDOW) :]
        starts = random.permutation((len(stream) - 1) // WINDOW) * WINDOW
        windows: Ids = stream[starts[:, None] + np.arange(WINDOW + 1)]
        return windows


class Trainer:
    """A model on its way through a plan. ``steps`` yields the state after each step."""

    def __init__(self, model: torch.nn.Module, windows: Windows, plan: Plan):
        self.model, self.plan, self.state = model, plan, State()
        self._windows = windows
        self._device = next(model.parameters()).device
        hidden: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            is_hidden = parameter.ndim == 2 and "embed" not in name
            (hidden if is_hidden else others).append(parameter)
        muon = torch.optim.Muon(hidden, weight_decay=plan.decay, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
        self._optimizers: tuple[torch.optim.Optimizer, ...] = (muon, adam)

    def steps(self) -> Iterator[State]:
        """Train until the plan is fulfilled."""
        start = time.monotonic() - self.state.seconds
        self.model.train()
        while (progress := self.plan.progress(self.state)) < 1:
            loss = self._step(self._windows.batch(self.state.step), progress)
            self.state = State(self.state.step + 1, self.state.tokens + self.plan.batch, time.monotonic() - start, loss)
            yield self.state

    def _step(self, batch: Ids, progress: float) -> float:
        length, rate = self.plan.length(progress), self.plan.rate * self.plan.factor(progress)
        rows = torch.from_numpy(batch).to(self._device)
        inputs, labels = rows[:, :-1].reshape(-1, length), rows[:, 1:].reshape(-1)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=has_fast_bfloat16(self._device)):
            logits = self.model(input_ids=inputs, use_cache=False).logits
        loss = cross_entropy(logits.float().flatten(0, 1), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Weights, both optimizers' state and how far it has come, in one file that is whole or the one before."""
        tensors = {f"model/{name}": value.detach() for name, value in self.model.named_parameters()}
        for i, optimizer in enumerate(self._optimizers):
            for key, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{i}/{key}/{name}": value for name, value in values.items()}
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, metadata={"state": json.dumps(asdict(self.state)), "plan": self._identity()})
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Go on where ``save`` wrote ``path``; ValueError if that was with another seed or batch."""
        with safe_open(path, framework="pt") as file:
            if file.metadata()["plan"] != self._identity():
                raise ValueError(f"{path} was trained with another seed or batch: {file.metadata()['plan']}")
            self.state = State(**json.loads(file.metadata()["state"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dictionary
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                value.copy_(tensors[f"model/{name}"])
        for i, optimizer in enumerate(self._optimizers):
            states: dict[int, dict[str, torch.Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith(f"optimizer/{i}/"):
                    key, field = name.split("/")[2:]
                    states.setdefault(int(key), {})[field] = value
            optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})

    def _identity(self) -> str:
        return json.dumps({"seed": self.plan.seed, "batch": self.plan.batch})


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 have instructions of their own."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
