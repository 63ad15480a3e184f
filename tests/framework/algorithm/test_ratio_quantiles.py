"""Quantiles from bins against exact ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.algorithm.ratio_quantiles import NUM_BINS, count_log_ratios, ratio_quantile

LOGS = st.one_of(st.floats(-9, 9), st.floats(-1e-3, 1e-3), st.floats(-1e-6, 1e-6), st.just(0.0))


@settings(deadline=None)
@given(st.lists(st.tuples(LOGS, st.booleans()), min_size=1, max_size=40), st.floats(0, 1))
def test_a_quantile_is_within_a_bin_of_the_exact_one(tokens, share):
    values = torch.tensor([value for value, _ in tokens], dtype=torch.float64)
    mask = torch.tensor([float(counts) for _, counts in tokens])
    half = len(tokens) // 2
    counts = count_log_ratios(values[:half], mask[:half]) + count_log_ratios(
        values[half:], mask[half:]
    )
    kept = sorted(value for value, counts in tokens if counts)
    assert counts.shape == (NUM_BINS,)
    assert counts.sum() == len(kept)
    found = math.log(ratio_quantile(counts, share))
    exact = kept[max(1, math.ceil(share * len(kept))) - 1] if kept else 0.0
    assert found == pytest.approx(exact, rel=0.08, abs=1.1e-7)


def test_what_is_not_finite_lies_outside():
    counts = count_log_ratios(torch.tensor([-math.inf, 0.0, 0.5, math.inf]), torch.ones(4))
    assert counts[0] == counts[-1] == 1
    assert ratio_quantile(counts, 0.5) == 1.0
    assert ratio_quantile(counts, 1.0) == pytest.approx(math.exp(10))
