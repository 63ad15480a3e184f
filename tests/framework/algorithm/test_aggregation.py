"""Token weights: a plain sum of weighted losses is the aggregate, however the batch is split."""

import pytest

from framework.algorithm.aggregation import token_weights


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    # sequences of 1 and 3 tokens with losses (6) and (1, 2, 3)
    [
        ("token_mean", 12 / 4),
        ("sequence_mean", (6 + 2) / 2),
        ("sequence_sum", (6 + 6) / 2),
        ("sequence_sum_over_length", (6 + 6) / 2 / 10),
    ],
)
def test_token_weights_sum_to_the_aggregate(aggregation, expected):
    total = 0.0
    for losses in ([6.0], [1.0, 2.0, 3.0]):
        weight = token_weights(
            aggregation,
            num_loss_tokens=len(losses),
            global_tokens=4,
            global_sequences=2,
            max_length=10,
        )
        total += weight * sum(losses)
    assert total == pytest.approx(expected)


def test_unknown_aggregation_names_the_key():
    with pytest.raises(ValueError, match=r"algorithm\.aggregation=mean.*token_mean"):
        token_weights("mean", num_loss_tokens=1, global_tokens=1, global_sequences=1)
