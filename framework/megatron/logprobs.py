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


def vocab_parallel_logprobs(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, tp_group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob of each label, and the entropy of each distribution.

    Args:
        logits: [T, Vpadded / tp], this rank's slice of the vocabulary; any float dtype.
        labels: [T] global token ids.
        vocab_size: number of real tokens.
        tp_group: the ranks that hold the other slices.

    Returns:
        logprobs [T] and entropy [T] in nats, fp32, the same on every rank of tp_group; gradients
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
    here = (labels >= start) & (labels < start + columns)
    index = (labels - start).where(here, 0)
    chosen = logits.gather(-1, index[..., None])[..., 0].where(here, 0.0)
    weights = logits.exp()
    sums = torch.stack([chosen, weights.sum(-1), (weights * logits).sum(-1)])
    if tp_group.size() > 1:
        sums = tensor_parallel.reduce_from_tensor_model_parallel_region(sums, group=tp_group)
    chosen, total, moment = sums
    return chosen - total.log(), total.log() - moment / total


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
    """GPTModel's output on the last pipeline stage: [2, T] fp32, log-probs and entropy of `labels`.

    Args:
        hidden_states: [T, 1, H], or [T / tp, 1, H] under sequence parallelism.
        labels: [1, T]: the token that each position predicts.
    """

    def logprobs(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits, _ = output_layer(hidden, weight=output_weight)
        logits = logits[:, 0]
        if context.temperature != 1.0:
            logits = logits.float() / context.temperature
        return torch.stack(
            vocab_parallel_logprobs(logits, targets, context.vocab_size, context.tp_group)
        )

    targets, size = labels[0], context.chunk_tokens
    if targets.numel() <= size:
        return logprobs(hidden_states, targets)
    gathers = config.sequence_parallel
    if gathers:
        # Gather once, not per chunk; the output layer already sums the gradient over tp.
        hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=context.tp_group
        )

    def chunk(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # Set here and not around the loop: the backward pass comes through here again.
        output_layer.sequence_parallel = False
        try:
            return logprobs(hidden, targets)
        finally:
            output_layer.sequence_parallel = gathers

    parts = [
        checkpoint(chunk, hidden, target, use_reentrant=False)
        for hidden, target in zip(hidden_states.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(parts, dim=1)
