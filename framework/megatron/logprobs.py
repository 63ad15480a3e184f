"""Log-probs and entropy of the labels from vocabulary-parallel logits, chunked over the sequence.

Plugs into GPTModel as its `output_processor`, so that the full [T, V] logits of a long sequence
never exist at once: each chunk is recomputed in the backward pass.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch.utils.checkpoint import checkpoint

MASKED = -1e30  # finite, so that its zero weight times itself is zero and not NaN


@dataclass(frozen=True)
class LogprobContext:
    """What the output processor needs besides the model's own tensors."""

    temperature: float
    vocab_size: int
    """Rows of the vocabulary that are real; the padding beyond takes no probability."""
    tp_group: Any
    chunk_tokens: int
    """Positions whose logits may be there at once."""
    top_ids: torch.Tensor | None = None
    """[k, T] int64: tokens whose log-probs are wanted too, different ones at each position."""


def vocab_parallel_logprobs(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    tp_group: Any,
    top_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Log-prob of each label, the entropy of each distribution, and what top_ids asks.

    Args:
        logits: [T, Vpadded / tp], this rank's slice of the vocabulary; any float dtype.
        labels: [T] global token ids.
        vocab_size: number of real tokens.
        tp_group: the ranks that hold the other slices.
        top_ids: [k, T] global token ids, different ones at each position.

    Returns:
        [2, T] log-probs and entropy in nats; with top_ids [2 + k + 1, T]: then their log-probs and
        the probability of all other tokens. fp32, the same on every rank of tp_group; gradients
        flow to this rank's slice of the logits.
    """
    logits = logits.float()
    columns = logits.size(-1)
    start = tp_group.rank() * columns
    if start + columns > vocab_size:
        padding = torch.arange(start, start + columns, device=logits.device) >= vocab_size
        logits = logits.masked_fill(padding, MASKED)
    top = logits.detach().amax(-1)
    if tp_group.size() > 1:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=tp_group)
    logits = logits - top[..., None]
    wanted = labels[None] if top_ids is None else torch.cat([labels[None], top_ids])
    index = (wanted - start).T  # [T, 1 + k]
    here = (index >= 0) & (index < columns)
    chosen = logits.gather(-1, index.where(here, 0)).where(here, 0.0)
    weights = logits.exp()
    parts = [weights.sum(-1)[None], (weights * logits).sum(-1)[None], chosen.T]
    if top_ids is not None:
        parts.append(_weight_beyond(weights, index[:, 1:].where(here[:, 1:], columns))[None])
    sums = torch.cat(parts)
    if tp_group.size() > 1:
        sums = tensor_parallel.reduce_from_tensor_model_parallel_region(sums, group=tp_group)
    total, moment, label, *_ = sums
    found = torch.stack([label - total.log(), total.log() - moment / total])
    if top_ids is None:
        return found
    return torch.cat([found, sums[3:-1] - total.log(), sums[-1:] / total])


def _weight_beyond(weights: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[T]: the sum of weights [T, V] without the columns `index` [T, k]; V: a column elsewhere."""
    columns = weights.size(-1)
    taken = weights.new_zeros((len(weights), columns + 1), dtype=torch.bool)
    taken.scatter_(-1, index, True)
    return weights.masked_fill(taken[:, :columns], 0.0).sum(-1)


def logprob_output_processor(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    context: LogprobContext,
    config: Any,
    **unused: Any,
) -> torch.Tensor:
    """GPTModel's output on the last pipeline stage: [2, T] fp32, log-probs and entropy of `labels`,
    or [2 + k + 1, T] where context.top_ids asks for more: see `vocab_parallel_logprobs`.

    Args:
        hidden_states: [T, 1, H], or [T / tp, 1, H] under sequence parallelism.
        labels: [1, T]: the token that each position predicts.
    """

    def logprobs(
        hidden: torch.Tensor, targets: torch.Tensor, top_ids: torch.Tensor | None
    ) -> torch.Tensor:
        logits, _ = output_layer(hidden, weight=output_weight)
        logits = logits[:, 0]
        if context.temperature != 1.0:
            logits = logits.float() / context.temperature
        return vocab_parallel_logprobs(
            logits, targets, context.vocab_size, context.tp_group, top_ids
        )

    targets, size, top_ids = labels[0], context.chunk_tokens, context.top_ids
    if targets.numel() <= size:
        return logprobs(hidden_states, targets, top_ids)
    gathers = config.sequence_parallel
    if gathers:
        # Gather once, not per chunk; the output layer already sums the gradient over tp.
        hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=context.tp_group
        )

    def chunk(
        hidden: torch.Tensor, targets: torch.Tensor, top_ids: torch.Tensor | None
    ) -> torch.Tensor:
        # Set here and not around the loop: the backward pass comes through here again.
        output_layer.sequence_parallel = False
        try:
            return logprobs(hidden, targets, top_ids)
        finally:
            output_layer.sequence_parallel = gathers

    pieces = targets.split(size)
    tops = [None] * len(pieces) if top_ids is None else top_ids.split(size, dim=1)
    parts = [
        checkpoint(chunk, hidden, target, top, use_reentrant=False)
        for hidden, target, top in zip(hidden_states.split(size), pieces, tops, strict=True)
    ]
    return torch.cat(parts, dim=1)
