"""Losses that treat some tokens of an update apart: who is chosen, and what becomes of them."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import evaluate, log, loss_inputs

from framework.algorithm.inputs import SelectionInputs
from framework.algorithm.losses import LOSSES
from framework.megatron.selection import cut_off, kth_largest, uniform_by_place


def candidates(uniform=(0.1, 0.2, 0.3, 0.4)):
    """Log-probs -1, -3, -1, -3 (mean -2), advantages 2, 2, -2, -2 (mean 0): covariances 2, -2, -2,
    2."""
    return SelectionInputs(
        old_logprobs=torch.tensor([-1.0, -3, -1, -3]),
        advantages=torch.tensor([2.0, 2, -2, -2]),
        uniform=torch.tensor(uniform),
        old_logprob_mean=-2.0,
        advantage_mean=0.0,
    )


def test_clip_cov_draws_among_tokens_within_the_bounds():
    selection = LOSSES["clip_cov"].bind_selection({"share": 0.25})
    assert selection is not None
    assert selection.share == 0.25
    found = selection.scores(candidates())
    torch.testing.assert_close(found, torch.tensor([0.1, -math.inf, -math.inf, 0.4]))
    above = LOSSES["clip_cov"].bind_selection({"covariance_low": 2.0})
    assert above is not None
    assert above.scores(candidates()).max() == -math.inf


def test_kl_cov_ranks_by_covariance():
    selection = LOSSES["kl_cov"].bind_selection({})
    assert selection is not None
    assert selection.scores(candidates()).tolist() == [2, -2, -2, 2]


def selected_inputs(*arguments):
    inputs = loss_inputs(*arguments)
    return dataclasses.replace(inputs, selected=torch.tensor([1.0] + [0.0] * 2))


def test_clip_cov_by_hand():
    # The first token is chosen: no loss, no gradient. The second is clipped by its ratio.
    inputs = selected_inputs(log(1, 1.5, 1), [0.0] * 3, [2.0, 2.0, 2.0])
    output, gradient = evaluate("clip_cov", inputs)
    torch.testing.assert_close(output.loss, torch.tensor([0.0, -2.4, -2.0]))
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, -2.0]))
    assert output.metrics["selected_fraction"].tolist() == [1.0, 0.0, 0.0]


def test_kl_cov_by_hand():
    # r = 1/2: loss -A/2, and penalty * log 2 at the chosen one, whose slope there is -penalty.
    inputs = selected_inputs(log(0.5, 0.5, 1.5), [0.0] * 3, [2.0, 2.0, 2.0])
    output, gradient = evaluate("kl_cov", inputs, penalty=3.0)
    torch.testing.assert_close(output.loss, torch.tensor([-1 + 3 * math.log(2), -1.0, -3.0]))
    torch.testing.assert_close(gradient, torch.tensor([-1.0 - 3.0, -1.0, -3.0]))


FLOATS = st.one_of(st.floats(-9, 9, width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, -math.inf]))


@settings(max_examples=60, deadline=None)
@given(values=st.lists(FLOATS, max_size=20), k=st.integers(1, 8))
def test_kth_largest_is_that_of_the_sorted_list(values, k):
    finite = sorted((value for value in values if value > -math.inf), reverse=True)
    found = kth_largest(torch.tensor(values), k, lambda counts: counts)
    if len(finite) >= k:
        assert found == finite[k - 1]
    else:  # every candidate is at least that
        assert all(value >= found for value in finite)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(0, 2), min_size=1, max_size=30), k=st.integers(1, 30))
def test_of_equal_scores_as_many_are_drawn_as_are_wanted(values, k):
    scores = torch.tensor(values).float()
    draws = uniform_by_place(
        0, torch.zeros(len(values), dtype=torch.long), torch.arange(len(values))
    )
    score, draw = cut_off(scores, draws, k, lambda counts: counts)
    chosen = (scores > score) | ((scores == score) & (draws >= draw))
    assert int(chosen.sum()) == min(k, len(values))
    assert chosen.all() or scores[chosen].min() >= scores[~chosen].max()


def test_random_numbers_belong_to_the_token():
    samples = torch.arange(40).repeat_interleave(50)
    positions = torch.arange(50).repeat(40)
    found = uniform_by_place(3, samples, positions)
    assert ((found >= 0) & (found < 1)).all()
    assert found.mean() == pytest.approx(0.5, abs=0.03)
    assert len(set(found.tolist())) > 1990
    order = torch.randperm(2000)
    assert torch.equal(uniform_by_place(3, samples[order], positions[order]), found[order])
    other = uniform_by_place(4, samples, positions)
    assert abs(torch.corrcoef(torch.stack([found, other]))[0, 1]) < 0.1
