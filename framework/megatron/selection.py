"""Tokens that a loss treats apart from the rest of its update, chosen before it over all ranks.

The loss gives every token a score (framework.algorithm.rows.Selection); those with the largest are
selected, `share` of the policy's tokens of the whole update. No rank sees another one's tokens:
sums give the means, and counts the score from which on tokens are selected.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from framework.algorithm.inputs import SelectionInputs
from framework.algorithm.rows import Selection
from framework.megatron.microbatch import Microbatch
from framework.megatron.parallel import Mesh

_WORD = 1 << 64


def select_tokens(
    microbatches: Sequence[Microbatch], selection: Selection, mesh: Mesh, step: int
) -> None:
    """Fill `selected` of one update's micro-batches, whose old_logprobs are known; collective."""
    scored = list(microbatches) if mesh.is_last_stage else []
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in scored:
        assert batch.old_logprobs is not None
        columns = torch.stack(
            [batch.old_logprobs, batch.advantages, torch.ones_like(batch.weights)]
        )
        sums += (columns.double() * batch.loss_mask).sum(-1).cpu()
    logprobs, advantages, tokens = _over_ranks(sums, mesh).tolist()
    tokens = max(1.0, tokens)
    scores = [
        _scores(batch, selection, logprobs / tokens, advantages / tokens, step) for batch in scored
    ]
    draws = [_uniform(batch, step) for batch in scored]
    mine, drawn = (torch.cat([torch.empty(0), *(e.cpu() for e in x)]) for x in (scores, draws))
    count = max(1, int(selection.share * tokens))
    threshold, draw = cut_off(mine, drawn, count, lambda counts: _over_ranks(counts, mesh))
    for batch, each, lot in zip(scored, scores, draws, strict=True):
        chosen = (each > threshold) | ((each == threshold) & (lot >= draw))
        batch.selected = (chosen & (each > -torch.inf)).float()


def _over_ranks(values: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The sum over ranks that hold different tokens."""
    values = values if mesh.reports else torch.zeros_like(values)
    dist.all_reduce(values)
    return values


def cut_off(
    scores: torch.Tensor,
    draws: torch.Tensor,
    count: int,
    add_up: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[float, float]:
    """(score, draw): the `count` largest scores are those above, and of equals those drawn so high.

    Without the draw all tokens of an update in which every advantage is 0 would be selected.
    """
    threshold = kth_largest(scores, count, add_up)
    above = int(add_up((scores > threshold).sum()[None].double()))
    equals = torch.where(scores == threshold, draws, -torch.inf)
    return threshold, kth_largest(equals, max(1, count - above), add_up)


def _uniform(batch: Microbatch, step: int) -> torch.Tensor:
    places = torch.tensor([*batch.samples, 0], device=batch.tokens.device)  # padding comes last
    samples = places[batch.sequence_ids.clamp(max=len(batch.samples))]
    return uniform_by_place(step, samples, batch.position_ids)


def _scores(
    batch: Microbatch, selection: Selection, logprobs: float, advantages: float, step: int
) -> torch.Tensor:
    assert batch.old_logprobs is not None
    found = selection.scores(
        SelectionInputs(
            old_logprobs=batch.old_logprobs,
            advantages=batch.advantages,
            uniform=_uniform(batch, step),
            old_logprob_mean=logprobs,
            advantage_mean=advantages,
        )
    )
    return torch.where(batch.loss_mask > 0, found.float(), -torch.inf)


def kth_largest(
    scores: torch.Tensor, k: int, add_up: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    """The k-th largest of all ranks' scores; the least finite one where there are fewer than k.

    Args:
        scores: [n] float32, this rank's; -inf counts as none.
        add_up: the sum of a [1] tensor over ranks.

    Bisection over the 2^32 values of a float: exact, and 33 sums of one number.
    """
    bits = scores.float().contiguous().view(torch.int32).long()
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ordered as the numbers are
    keys = keys[scores > -torch.inf]
    low, high = -(1 << 31), 1 << 31  # at least k are >= low, fewer are >= high
    while high - low > 1:
        middle = (low + high) // 2
        enough = int(add_up((keys >= middle).sum()[None].double())) >= k
        low, high = (middle, high) if enough else (low, middle)
    if low == -(1 << 31):
        return -torch.inf
    key = torch.tensor([low if low >= 0 else low ^ 0x7FFFFFFF], dtype=torch.int32)
    return key.view(torch.float32).item()


def uniform_by_place(step: int, samples: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[T] float32 in [0, 1), by step, sample of the batch and position alone (splitmix64)."""
    mixed = samples * _signed(0x9E3779B97F4A7C15) + positions * _signed(0xD1B54A32D192ED03)
    mixed = mixed + _signed(step * 0x8CB92BA72F3D8DD7)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    return (_shifted(mixed ^ _shifted(mixed, 31), 40)).float() / (1 << 24)


def _shifted(values: torch.Tensor, count: int) -> torch.Tensor:
    """A shift to the right that brings zeros."""
    return (values >> count) & ((1 << (64 - count)) - 1)


def _signed(word: int) -> int:
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word
