"""What a model and a pair of them are worth on text they have not seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from pair.corpus import Ids


@dataclass(frozen=True)
class Agreement:
    """How a draft does under a target on the same text, teacher-forced: both see what is really there."""

    target: float
    """Loss, nats per token."""
    draft: float
    """Loss, nats per token."""
    acceptance: float
    """Mean over positions of sum over tokens of min(p, q): how often a sampled draft token is taken (Y. Leviathan et
    al., *Fast Inference from Transformers via Speculative Decoding*, 2023, corollary 3.6)."""
    greedy: float
    """Share of positions in which both hold the same token for the likeliest."""
    tokens: int


def windows(ids: Ids, length: int, at_most: int) -> torch.Tensor:
    """Neighbouring windows [count, length + 1] from the start of ``ids``, of at most so many tokens together."""
    length = min(length, len(ids) - 1)
    count = max(1, min(len(ids) - 1, at_most) // length)
    return torch.from_numpy(ids[: count * length + 1]).unfold(0, length + 1, length)


@torch.no_grad()
def loss(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Mean cross-entropy of ``rows`` [count, length + 1] in nats per token, in float32."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    losses = []
    for row in rows.to(device):
        logits = model(input_ids=row[None, :-1], use_cache=False).logits[0]
        losses.append(float(cross_entropy(logits.float(), row[1:])))
    model.train(training)
    return sum(losses) / len(losses)


@torch.no_grad()
def agreement(target: LlamaForCausalLM, draft: LlamaForCausalLM, rows: torch.Tensor) -> Agreement:
    """Both models on every row of ``rows`` [count, length + 1], in float32."""
    sums = torch.zeros(4, dtype=torch.float64)
    for row in rows.to(target.device):
        p, q = (m.eval()(input_ids=row[None, :-1], use_cache=False).logits[0].float() for m in (target, draft))
        shared = torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1)
        same = p.argmax(-1) == q.argmax(-1)
        losses = (cross_entropy(logits, row[1:], reduction="sum") for logits in (p, q))
        sums += torch.stack([*losses, shared.sum(), same.sum()]).cpu().double()
    count = rows.shape[0] * (rows.shape[1] - 1)
    target_loss, draft_loss, acceptance, greedy = (sums / count).tolist()
    return Agreement(target_loss, draft_loss, acceptance, greedy, count)
