"""The scalar head of a reward model in megatron-core's GPTModel, in place of its output layer."""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig


class ScoreHead(torch.nn.Linear):
    """hidden [T, 1, H] -> scores [T, 1, 1]; the weight, [1, H], is whole on every rank.

    Under sequence parallelism a rank sees T / tp positions: its scores are gathered, and megatron
    sums the weight's gradient over tensor-parallel ranks as it does for norms.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.hidden_size, 1, bias=False, dtype=config.params_dtype)
        torch.nn.init.zeros_(self.weight)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010


def score_output_processor(
    *,
    hidden_states: torch.Tensor,
    output_layer: Any,
    context: Any,
    config: Any,
    **unused: Any,
) -> torch.Tensor:
    """GPTModel's output on the last pipeline stage: [1, T] fp32, a score at every position.

    Args:
        hidden_states: [T, 1, H], or [T / tp, 1, H] under sequence parallelism.
        context: a LogprobContext, for its tp_group.
    """
    scores = output_layer(hidden_states)
    if config.sequence_parallel:
        scores = tensor_parallel.gather_from_sequence_parallel_region(
            scores, tensor_parallel_output_grad=False, group=context.tp_group
        )
    return scores[:, 0].float().T
