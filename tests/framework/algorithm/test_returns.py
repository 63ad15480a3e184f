"""Rewards of tokens: discounted returns with a KL penalty, its coefficient, the running spread."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.algorithm.critic.inputs import TokenRows, ValuedTokens
from framework.algorithm.kl_control import next_coefficient
from framework.algorithm.returns import RETURN_ADVANTAGES
from framework.algorithm.running_std import RunningStd


def returns(mask, ids, earned, penalties, **knobs):
    """[T] advantages of packed positions; earned: one a sample, penalties: one a position."""
    mask = torch.tensor(mask, dtype=torch.float32)
    rows = TokenRows(mask, torch.tensor(ids), len(earned))
    rewards = rows.last(torch.tensor(earned)) - rows.rows(torch.tensor(penalties))
    inputs = ValuedTokens(
        values=torch.zeros_like(rewards),
        rewards=rewards,
        mask=rows.rows(mask),
        turn_ends=torch.zeros_like(rewards),
    )
    return rows.packed(RETURN_ADVANTAGES["discounted_return"].bind(knobs)(inputs)).tolist()


def test_discounted_return_by_hand():
    # Sample 0: policy tokens at 1, 2 and 4, position 3 was told; sample 1: one token.
    found = returns(
        [0, 1, 1, 0, 1, 1], [0] * 5 + [1], [1.0, 2.0], [9.0, 0.1, -0.2, 9.0, 0.3, 0.5], gamma=0.5
    )
    last = 1 - 0.3
    middle = 0.2 + 0.5 * last
    assert found == pytest.approx([0, -0.1 + 0.5 * middle, middle, 0, last, 1.5], abs=1e-6)


TOKENS = st.lists(
    st.lists(st.tuples(st.booleans(), st.floats(-2, 2)), min_size=1, max_size=7),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, deadline=None)
@given(TOKENS, st.sampled_from([0.0, 0.5, 0.97, 1.0]))
def test_discounted_return_agrees_with_a_plain_loop(samples, gamma):
    """A sample of one token, of none that the policy wrote, of any; whatever others wrote."""
    earned = [float(i) - 1.5 for i in range(len(samples))]
    wanted = []
    for tokens, reward in zip(samples, earned, strict=True):
        later, last, row = 0.0, True, []
        for written, penalty in reversed(tokens):
            if written:
                later = gamma * later - penalty + reward * last
                last = False
            row.append(later if written else 0.0)
        wanted += row[::-1]
    mask, penalties = zip(*[token for tokens in samples for token in tokens], strict=True)
    ids = [i for i, tokens in enumerate(samples) for _ in tokens]
    found = returns([*map(float, mask)], ids, earned, [*penalties], gamma=gamma)
    assert found == pytest.approx(wanted, abs=1e-5)


def test_without_a_penalty_every_token_gets_the_reward():
    assert returns([1, 1, 0, 1], [0] * 4, [0.75], [0.0] * 4) == [0.75, 0.75, 0, 0.75]
    assert returns([0, 0], [0, 0], [3.0], [0.0, 0.0]) == [0, 0]  # nothing written


def test_the_coefficient_moves_by_a_fifth_at_most():
    knobs = {"target": 6.0, "horizon": 1000.0, "num_samples": 100}
    assert next_coefficient(0.1, 6.0, **knobs) == 0.1
    assert next_coefficient(0.1, 6.6, **knobs) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert next_coefficient(0.1, 60.0, **knobs) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert next_coefficient(0.1, -3.0, **knobs) == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    many = {**knobs, "num_samples": 100 * 1000}  # a step of more than the horizon
    assert next_coefficient(0.1, -3.0, **many) == pytest.approx(0.1 * 0.8)
    assert next_coefficient(0.1, 9.0, target=0.0, horizon=1.0, num_samples=9) == 0.1


BATCHES = st.lists(st.lists(st.floats(-5, 5), max_size=6), min_size=1, max_size=5)


@settings(deadline=None)  # a busy machine takes longer
@given(BATCHES)
def test_the_running_spread_is_that_of_everything_seen(batches):
    whole, goes_on = RunningStd(), RunningStd()
    for batch in batches:
        whole.add(batch)
        restored = RunningStd()
        restored.restore("x_", goes_on.state("x_"))
        mean = sum(batch) / max(1, len(batch))
        restored.add_moments(len(batch), mean, sum((each - mean) ** 2 for each in batch))
        goes_on = restored
    seen = [value for batch in batches for value in batch]
    spread = float(np.std(seen)) if seen else 0.0
    assert whole.std == pytest.approx(spread if spread > 1e-8 else 1.0, abs=1e-6)
    for name in ("count", "mean", "squares"):
        assert getattr(goes_on, name) == pytest.approx(getattr(whole, name), abs=1e-9)
    assert math.isfinite(whole.std)
