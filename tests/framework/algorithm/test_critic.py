"""GAE, bi-level GAE and the value loss: by hand, against plain loops, and what must hold always."""

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.algorithm.critic import VALUE_ADVANTAGES
from framework.algorithm.critic.inputs import TokenRows, ValuedTokens
from framework.algorithm.critic.value_loss import value_loss


def estimate(name, mask, ids, values, rewards, ends=None, **knobs):
    """[T] advantages of packed positions; rewards: one a sample."""
    mask = torch.tensor(mask, dtype=torch.float32)
    rows = TokenRows(mask, torch.tensor(ids), len(rewards))
    inputs = ValuedTokens(
        values=rows.rows(torch.tensor(values, dtype=torch.float64)),
        rewards=rows.last(torch.tensor(rewards, dtype=torch.float64)),
        mask=rows.rows(mask),
        turn_ends=rows.rows(torch.tensor(ends or [0.0] * len(ids))),
    )
    return rows.packed(VALUE_ADVANTAGES[name].bind(knobs)(inputs)).tolist()


def by_loop(mask, ids, values, rewards, gamma, lam):
    """GAE as the paper writes it, over each sample's own policy tokens."""
    found = [0.0] * len(mask)
    for sample, reward in enumerate(rewards):
        places = [t for t in range(len(mask)) if ids[t] == sample and mask[t]]
        value = advantage = 0.0
        for k, t in enumerate(reversed(places)):
            delta = (reward if k == 0 else 0.0) + gamma * value - values[t]
            advantage = delta + gamma * lam * advantage
            value = values[t]
            found[t] = advantage
    return found


def bi_level_by_loop(mask, ids, values, rewards, ends, gamma, lam, turn_gamma):
    """RAGEN's two passes, with turns as given."""
    found = [0.0] * len(mask)
    for sample, reward in enumerate(rewards):
        places = [t for t in range(len(mask)) if ids[t] == sample and mask[t]]
        last = [t for t in places if ends[t]]
        returns, value, advantage = {}, 0.0, 0.0
        for t in reversed(last):
            delta = (reward if t == places[-1] else 0.0) + turn_gamma * value - values[t]
            advantage = delta + turn_gamma * lam * advantage
            value = values[t]
            returns[t] = advantage + value
        for t in reversed(places):
            if ends[t]:
                value = advantage = 0.0
            advantage = returns.get(t, 0.0) + gamma * value - values[t] + gamma * lam * advantage
            value = values[t]
            found[t] = advantage
    return found


def test_gae_by_hand_skips_what_the_environment_wrote():
    # Policy tokens at 1, 2 and 4; position 3 was told by the environment and has a wild value.
    found = estimate(
        "gae", [0, 1, 1, 0, 1], [0] * 5, [7.0, 0.5, 0.25, 99.0, 0.5], [1.0], gamma=0.5, lam=0.5
    )
    last = 1 - 0.5
    middle = 0.5 * 0.5 - 0.25 + 0.25 * last
    first = 0.5 * 0.25 - 0.5 + 0.25 * middle
    assert found == pytest.approx([0, first, middle, 0, last])


def test_bi_level_gae_by_hand():
    # Two turns of two tokens, reward 1: V = .1 .2 | .3 .4
    found = estimate(
        "bi_level_gae",
        [1, 1, 0, 1, 1],
        [0] * 5,
        [0.1, 0.2, 9.0, 0.3, 0.4],
        [1.0],
        [0, 1, 0, 0, 1],
        gamma=0.9,
        lam=0.5,
        turn_gamma=0.8,
    )
    second = 1 - 0.4
    first = 0.8 * 0.4 - 0.2 + 0.8 * 0.5 * second
    tokens = [0.9 * 0.2 - 0.1 + 0.45 * first, first, 0, 0.9 * 0.4 - 0.3 + 0.45 * second, second]
    assert found == pytest.approx(tokens)


PACKED = st.lists(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(-2, 2)), min_size=1, max_size=9),
    min_size=1,
    max_size=4,
)
FACTOR = st.sampled_from([0.0, 0.5, 0.97, 1.0])


@settings(max_examples=60, deadline=None)
@given(PACKED, FACTOR, FACTOR, FACTOR)
def test_both_agree_with_plain_loops(samples, gamma, lam, turn_gamma):
    ids = [i for i, sample in enumerate(samples) for _ in sample]
    mask, ends, values = (list(each) for each in zip(*chain(*samples), strict=True))
    for i in set(ids):  # the last policy token ends a turn
        written = [t for t in range(len(ids)) if ids[t] == i and mask[t]]
        for t in written[-1:]:
            ends[t] = True
    rewards = [float(i) - 1.5 for i in range(len(samples))]
    found = estimate("gae", mask, ids, values, rewards, ends, gamma=gamma, lam=lam)
    assert found == pytest.approx(by_loop(mask, ids, values, rewards, gamma, lam), abs=1e-9)
    knobs = {"gamma": gamma, "lam": lam, "turn_gamma": turn_gamma}
    found = estimate("bi_level_gae", mask, ids, values, rewards, ends, **knobs)
    wanted = bi_level_by_loop(mask, ids, values, rewards, ends, gamma, lam, turn_gamma)
    assert found == pytest.approx(wanted, abs=1e-9)


def test_closed_forms():
    values, reward = [0.3, -0.2, 0.6, 0.1], [2.0]
    at_one = estimate("gae", [1] * 4, [0] * 4, values, reward)
    assert at_one == pytest.approx([2 - value for value in values])  # lam 1: return - value
    at_zero = estimate("gae", [1] * 4, [0] * 4, values, reward, lam=0.0)
    assert at_zero == pytest.approx([-0.5, 0.8, -0.5, 1.9])
    exact = estimate("gae", [1] * 4, [0] * 4, [2 * 0.9**k for k in (3, 2, 1, 0)], reward, gamma=0.9)
    assert exact == pytest.approx([0] * 4)  # a critic that is right leaves nothing
    # One turn: nothing but token GAE.
    both = [
        estimate(name, [1] * 4, [0] * 4, values, reward, [0, 0, 0, 1], gamma=0.9, lam=0.8)
        for name in VALUE_ADVANTAGES
    ]
    assert both[0] == pytest.approx(both[1])


@pytest.mark.parametrize("name", VALUE_ADVANTAGES)
def test_samples_of_one_token_none_and_nothing_written(name):
    # Sample 0: one token. 1: no position at all. 2: nothing the policy wrote.
    found = estimate(name, [1, 0, 0], [0, 2, 2], [0.25, 5.0, 5.0], [1.0, 3.0, 3.0], [1, 0, 0])
    assert found == [0.75, 0, 0]
    assert estimate(name, [0, 0], [0, 0], [1.0, 1.0], [1.0]) == [0, 0]


def test_value_loss_by_hand():
    values = torch.tensor([0.0, 1.0, 0.1, 0.9], requires_grad=True)
    old, returns = torch.tensor([0.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    loss, clipped = value_loss(values, old, returns, clip=0.2)
    # 1: the clipped value .2 is further from the return; 3: the plain error is the larger one.
    assert loss.tolist() == pytest.approx([0.5, 0.5 * 0.64, 0.5 * 0.81, 0.5 * 0.81])
    assert clipped.tolist() == [0, 1, 0, 0]
    loss.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-1, 0, -0.9, 0.9])
    plain, none = value_loss(values, old, returns, clip=0.0)
    assert plain.tolist() == pytest.approx([0.5, 0, 0.5 * 0.81, 0.5 * 0.81])
    assert not none.any()
