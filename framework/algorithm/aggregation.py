"""From per-token losses to the loss of the global batch.

`token_weights` gives every token its share of the global batch, so that a plain sum over tokens,
micro-batches and ranks is the aggregate, however the batch is split.
"""

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "sequence_sum_over_length")


def token_weights(
    aggregation: str,
    *,
    num_loss_tokens: int,
    global_tokens: int,
    global_sequences: int,
    max_length: int = 1,
) -> float:
    """The weight of each policy token of one sequence.

    Args:
        aggregation: token_mean: 1 / all tokens (DAPO); sequence_mean: the mean over sequences of
            each one's token mean (GRPO as published); sequence_sum: the mean over sequences of
            each one's token sum; sequence_sum_over_length: that divided by max_length (Dr.GRPO).
        num_loss_tokens: policy tokens of this sequence.
        global_tokens: policy tokens of the global batch (all data-parallel ranks, all
            micro-batches of the update).
        global_sequences: sequences of the global batch that have policy tokens.
        max_length: longest response that could have been sampled, in tokens.

    Raises:
        ValueError: an unknown aggregation.
    """
    if aggregation == "token_mean":
        return 1.0 / max(1, global_tokens)
    if aggregation == "sequence_mean":
        return 1.0 / (max(1, global_sequences) * max(1, num_loss_tokens))
    if aggregation == "sequence_sum":
        return 1.0 / max(1, global_sequences)
    if aggregation == "sequence_sum_over_length":
        return 1.0 / (max(1, global_sequences) * max_length)
    raise ValueError(
        f"algorithm.aggregation={aggregation}: must be one of {', '.join(AGGREGATIONS)}"
    )
