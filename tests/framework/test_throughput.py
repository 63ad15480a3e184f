"""Figures of speed, by hand."""

import pytest

from framework.flops import TrainingFlops
from framework.throughput import device_peak_flops, train_figures

FLOPS = TrainingFlops(per_token=10, per_token_squared=1)


def test_operations_and_tokens_are_those_of_the_unpadded_sequences():
    # 2 * (10 + 2) + 5 * (10 + 5) = 99 operations on 7 tokens, in 2 s, by 3 ranks.
    figures = train_figures([2, 5], FLOPS, train_s=2.0, num_ranks=3)
    assert figures == {
        "perf/rank_tokens_per_s": pytest.approx(7 / 6),
        "perf/rank_flops_per_s": pytest.approx(99 / 6),
    }


def test_mfu_is_given_where_the_peak_is_known():
    figures = train_figures([2, 5], FLOPS, train_s=2.0, num_ranks=3, peak_flops=33.0)
    assert figures["perf/mfu"] == pytest.approx(0.5)
    assert device_peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert device_peak_flops("AMD EPYC") is None
