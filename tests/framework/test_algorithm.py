"""Advantages and losses against values computed by hand, and the invariances users rely on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.algorithm.advantages import AdvantageConfig, AdvantageInputs, group_normalized
from framework.algorithm.losses import (
    LossConfig,
    LossInputs,
    negative_log_likelihood,
    ppo_clip,
    token_weights,
)


def advantages(rewards, groups, eps=0.0):
    inputs = AdvantageInputs(
        rewards=torch.tensor(rewards, dtype=torch.float32),
        group_ids=torch.tensor(groups),
        response_lengths=[1] * len(rewards),
    )
    outputs = group_normalized(inputs, AdvantageConfig(std_eps=eps))
    return torch.cat(outputs)


def test_group_normalized_by_hand_with_uneven_interleaved_groups():
    # Group 7: rewards 1, 0, 0: mean 1/3, unbiased std sqrt(1/3). Group 2: 1, 0: std sqrt(1/2).
    found = advantages([1, 1, 0, 0, 0], [7, 2, 7, 2, 7])
    third, half = math.sqrt(1 / 3), math.sqrt(1 / 2)
    expected = [2 / 3 / third, 0.5 / half, -1 / 3 / third, -0.5 / half, -1 / 3 / third]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_equal_rewards_and_groups_of_one_give_zero_not_nan():
    assert advantages([0.3, 0.3, 0.3, 5.0], [0, 0, 0, 1], eps=1e-6).tolist() == [0.0] * 4


def test_advantage_covers_every_response_token():
    inputs = AdvantageInputs(
        rewards=torch.tensor([1.0, 0.0]),
        group_ids=torch.tensor([0, 0]),
        response_lengths=[3, 0],
    )
    first, second = group_normalized(inputs, AdvantageConfig())
    assert first.shape == (3,)
    assert second.shape == (0,)
    assert len(set(first.tolist())) == 1


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.25, 1.0])), min_size=1, max_size=24
    ),
    order=st.randoms(use_true_random=False),
)
def test_group_normalized_does_not_depend_on_order_shift_or_scale(data, order):
    groups, rewards = (list(column) for column in zip(*data, strict=True))
    found = advantages(rewards, groups)
    shuffled = list(range(len(data)))
    order.shuffle(shuffled)
    again = advantages([4 * rewards[i] + 2 for i in shuffled], [groups[i] for i in shuffled])
    spread = [len({r for r, g in zip(rewards, groups, strict=True) if g == k}) > 1 for k in groups]
    for place, i in enumerate(shuffled):
        if spread[i]:
            assert again[place] == pytest.approx(found[i].item(), abs=1e-5)


def loss_inputs(policy, old, advantage):
    policy = torch.tensor(policy, requires_grad=True)
    return policy, LossInputs(
        policy_logprobs=policy,
        old_logprobs=torch.tensor(old),
        advantages=torch.tensor(advantage),
        loss_mask=torch.ones(len(old)),
        entropy=torch.zeros(len(old)),
    )


def test_ppo_clip_value_and_gradient_by_hand():
    # ratios: 1, 1.5 (clipped up for A > 0), 0.5 (clipped down for A < 0), 1.5 with A < 0 (kept)
    policy, inputs = loss_inputs(
        [0.0, math.log(1.5), math.log(0.5), math.log(1.5)], [0.0] * 4, [2.0, 2.0, -2.0, -2.0]
    )
    output = ppo_clip(inputs, LossConfig(clip_low=0.2, clip_high=0.3))
    torch.testing.assert_close(output.loss, torch.tensor([-2.0, -2.6, 1.6, 3.0]))
    output.loss.sum().backward()
    # d(-r A)/d log pi = -r A where the clip does not bind, 0 where it does
    torch.testing.assert_close(policy.grad, torch.tensor([-2.0, 0.0, 0.0, 3.0]))
    assert output.metrics["clip_fraction"].tolist() == [0.0, 1.0, 1.0, 0.0]


def test_ppo_clip_at_the_old_policy_is_the_policy_gradient():
    policy, inputs = loss_inputs([-1.0, -2.0], [-1.0, -2.0], [0.7, -0.3])
    ppo_clip(inputs, LossConfig()).loss.sum().backward()
    torch.testing.assert_close(policy.grad, torch.tensor([-0.7, 0.3]))


def test_negative_log_likelihood():
    _, inputs = loss_inputs([-1.5, -0.5], [0.0, 0.0], [0.0, 0.0])
    assert negative_log_likelihood(inputs, LossConfig()).loss.tolist() == [1.5, 0.5]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    # sequences of 1 and 3 tokens with losses (6) and (1, 2, 3)
    [("token_mean", 12 / 4), ("sequence_mean", (6 + 2) / 2), ("sequence_sum", (6 + 6) / 2)],
)
def test_token_weights_sum_to_the_aggregate(aggregation, expected):
    total = 0.0
    for losses in ([6.0], [1.0, 2.0, 3.0]):
        weight = token_weights(
            aggregation, num_loss_tokens=len(losses), global_tokens=4, global_sequences=2
        )
        total += weight * sum(losses)
    assert total == pytest.approx(expected)


def test_unknown_aggregation_names_the_key():
    with pytest.raises(ValueError, match=r"algorithm\.aggregation=mean.*token_mean"):
        token_weights("mean", num_loss_tokens=1, global_tokens=1, global_sequences=1)
