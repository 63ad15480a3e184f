"""Bradley-Terry: a value and a gradient by hand, and what a margin does."""

import math

import pytest
import torch

from framework.algorithm.reward import REWARD_LOSSES
from framework.algorithm.reward.inputs import ScoredPairs


def evaluate(chosen, rejected, margin, **knobs):
    chosen = torch.tensor([chosen], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([rejected], dtype=torch.float64, requires_grad=True)
    margins = torch.tensor([margin], dtype=torch.float64)
    inputs = ScoredPairs(chosen=chosen, rejected=rejected, margins=margins)
    output = REWARD_LOSSES["bradley_terry"].bind(knobs)(inputs)
    output.loss.sum().backward()
    return output, (output.loss.item(), chosen.grad.item(), rejected.grad.item())


def test_bradley_terry_by_hand():
    # s_c - s_r = log 4: sigmoid = 4/5, L = log 5/4, slope -1/5
    output, found = evaluate(math.log(4), 0.0, 0.0)
    assert found == pytest.approx((math.log(1.25), -0.2, 0.2))
    assert output.correct.tolist() == [True]
    # a margin of log 2 is taken off: sigmoid(log 2) = 2/3
    _, found = evaluate(math.log(4), 0.0, math.log(2))
    assert found == pytest.approx((math.log(1.5), -1 / 3, 1 / 3))
    # centering adds (1/2) (s_c + s_r)^2 and its slope to both
    _, found = evaluate(1.0, 1.0, 0.0, center_coef=0.5)
    assert found == pytest.approx((math.log(2) + 2, -0.5 + 2, 0.5 + 2))


def test_only_the_difference_of_scores_counts():
    _, one = evaluate(1.0, -2.0, 0.5)
    _, other = evaluate(101.0, 98.0, 0.5)
    assert one == pytest.approx(other)
    _, extreme = evaluate(-1e4, 1e4, 0.0)
    assert all(math.isfinite(value) for value in extreme)
