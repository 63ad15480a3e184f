"""Every estimator against values computed by hand, and the invariances users rely on."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.algorithm.advantages import ADVANTAGES
from framework.algorithm.inputs import AdvantageInputs, Turns
from framework.config import AlgorithmConfig, RunConfig
from framework.objective import build_objective
from rollout.types import SampleInfo, StepBatch


def estimate(name, rewards, groups, tokens=None, *, baselines=None, components=None, **knobs):
    """The one value of each sample; checks that it covers its whole response."""
    components = {"a": rewards} if components is None else components
    # Without others the first reward of all is the greedy answer's: it shifts and scales with them.
    baselines = [rewards[0]] * len(rewards) if baselines is None else baselines
    tokens = tokens or [1] * len(rewards)
    lengths = [count + 1 for count in tokens]  # a token that the policy did not write in each
    inputs = AdvantageInputs(
        rewards=torch.tensor(rewards, dtype=torch.float32),
        group_ids=torch.tensor(groups),
        response_lengths=lengths,
        num_loss_tokens=tokens,
        components={name: torch.tensor(values) for name, values in components.items()},
        baselines=torch.tensor(baselines),
        turns=[Turns(starts=[0], states=["start"], rewards=[float(each)]) for each in rewards],
    )
    found = ADVANTAGES[name].bind(knobs)(inputs)
    assert [len(values) for values in found] == lengths
    assert all(len(set(values.tolist())) == 1 for values in found)
    return [values[0].item() for values in found]


# Groups of uneven size, interleaved. Group 7: rewards 1, 0, 0; group 2: 1, 0.
REWARDS = [1, 1, 0, 0, 0]
GROUPS = [7, 2, 7, 2, 7]
CENTERED = [2 / 3, 1 / 2, -1 / 3, -1 / 2, -1 / 3]


def test_group_normalized_by_hand():
    stds = [math.sqrt(1 / 3), math.sqrt(1 / 2)]  # unbiased, of groups 7 and 2
    expected = [value / stds[i % 2] for i, value in enumerate(CENTERED)]
    assert estimate("group_normalized", REWARDS, GROUPS, std_eps=1e-12) == pytest.approx(expected)
    # eps is added to the deviation, not under the root
    first = estimate("group_normalized", REWARDS, GROUPS, std_eps=0.5)[0]
    assert first == pytest.approx(2 / 3 / (math.sqrt(1 / 3) + 0.5))


def test_group_centered_by_hand():
    assert estimate("group_centered", REWARDS, GROUPS) == pytest.approx(CENTERED)


def test_group_centered_and_normalized_by_hand():
    # 3 tokens of the first sample, 1 of each other: mean (3 * 2/3 + 1/2 - 1/3 - 1/2 - 1/3) / 7
    mean = (2 - 2 / 3) / 7
    weights = [3, 1, 1, 1, 1]
    variance = sum(w * (c - mean) ** 2 for w, c in zip(weights, CENTERED, strict=True)) / 7
    found = estimate("group_centered", REWARDS, GROUPS, weights, normalize=True)
    assert found == pytest.approx([(c - mean) / math.sqrt(variance) for c in CENTERED])


def test_leave_one_out_by_hand():
    # The others of the first sample: mean 0. Of the third: (1 + 0) / 2.
    assert estimate("leave_one_out", REWARDS, GROUPS) == pytest.approx([1, 1, -0.5, -1, -0.5])


def test_batch_normalized_by_hand():
    # Over 2 + 6 tokens: mean 2/8, biased variance 1/4 * 3/4.
    found = estimate("batch_normalized", [1, 0], [0, 1], [2, 6])
    std = math.sqrt(3 / 16)
    assert found == pytest.approx([0.75 / std, -0.25 / std])


def test_group_mean_batch_std_by_hand():
    # All five rewards: mean 2/5, unbiased variance (2 * .36 + 3 * .16) / 4 = .3
    found = estimate("group_mean_batch_std", REWARDS, GROUPS, std_eps=1e-12)
    assert found == pytest.approx([value / math.sqrt(0.3) for value in CENTERED])


def test_plain_reward_by_hand():
    assert estimate("plain_reward", [1, 0.5, 0], [0, 0, 1]) == [1, 0.5, 0]
    assert estimate("plain_reward", [1, 0.5, 0], [0, 0, 1], baseline=0.5) == [0.5, 0, -0.5]


def test_greedy_baseline_by_hand():
    baselines = [0.5, 0.5, 1.0]
    found = estimate("greedy_baseline", [1, 0, 1], [0, 0, 1], baselines=baselines)
    assert found == [0.5, -0.5, 0.0]
    # normalised over 1 + 1 + 2 tokens: mean 0, biased variance (.25 + .25) / 4
    normal = estimate(
        "greedy_baseline", [1, 0, 1], [0, 0, 1], [1, 1, 2], baselines=baselines, normalize=True
    )
    assert normal == pytest.approx([0.5 / math.sqrt(0.125), -0.5 / math.sqrt(0.125), 0], abs=1e-6)


def test_component_normalized_by_hand():
    # Groups of two, so that a component that differs is +-1/sqrt(2) whatever its scale. Sample 0 is
    # best in both, samples 2 and 3 are torn; b weighs half.
    half = math.sqrt(0.5)
    components = {"a": [9.0, 1.0, 1.0, 0.0], "b": [0.2, 0.1, 0.0, 1.0]}
    sums = [1.5 * half, -1.5 * half, 0.5 * half, -0.5 * half]
    spread = math.sqrt((2 * 1.5**2 + 2 * 0.5**2) / 2 / 4)
    found = estimate(
        "component_normalized",
        [0.0] * 4,
        [0, 0, 1, 1],
        components=components,
        weights={"a": 1.0, "b": 0.5},
        std_eps=1e-9,
    )
    assert found == pytest.approx([value / spread for value in sums])
    # A component that is alike in a group leaves the other one's difference whole.
    alike = {"a": [1.0, 0.0, 1.0, 0.0], "b": [5.0, 5.0, 5.0, 5.0]}
    found = estimate("component_normalized", [0.0] * 4, [0, 0, 1, 1], components=alike)
    assert found == pytest.approx([1, -1, 1, -1], abs=1e-4)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_samples_that_failed_or_are_empty_are_compared_with_nobody(name):
    """They get zeros; the others get what they would without them."""
    told = {"turn_starts": [0], "turn_states": ["s"], "turn_rewards": [0.0]}
    whole = [
        SampleInfo(
            group_id=k // 2,
            index=k % 2,
            prompt_length=3,
            response_length=length,
            num_loss_tokens=length,
            reward=reward,
            version=0,
            rewards={"a": reward},
            baseline_reward=0.5,
            **told,
        )
        for k, (length, reward) in enumerate([(1, 1.0), (4, 0.0), (2, 0.25), (1, 1.0)])
    ]
    failed = replace(whole[1], num_loss_tokens=0, reward=9.0, index=2, rewards={})
    empty = replace(failed, response_length=0, index=3, group_id=1)
    objective = build_objective(RunConfig(algorithm=AlgorithmConfig(advantage=name)))
    batch = StepBatch(step=0, samples=[*whole[:2], failed, *whole[2:], empty], staleness_max=0)
    found = objective.advantages(batch, {})
    assert [each.tolist() for each in (found.pop(2), found.pop())] == [[0.0] * 4, []]
    alone = objective.advantages(replace(batch, samples=whole), {})
    assert [each.tolist() for each in found] == [each.tolist() for each in alone]
    assert [len(each) for each in found] == [1, 4, 2, 1]
    assert any(each.any() for each in found)
    nothing = objective.advantages(replace(batch, samples=[failed, empty]), {})
    assert [each.tolist() for each in nothing] == [[0.0] * 4, []]


def test_what_an_estimator_needs_is_asked_for_by_name():
    with pytest.raises(ValueError, match=r"the component b; data.reward gave a"):
        estimate("component_normalized", [1, 0], [0, 0], weights={"b": 1.0})
    with pytest.raises(ValueError, match=r"data.reward has no components"):
        estimate("component_normalized", [1, 0], [0, 0], components={})
    inputs = AdvantageInputs(
        rewards=torch.ones(1),
        group_ids=torch.zeros(1, dtype=torch.int64),
        response_lengths=[1],
        num_loss_tokens=[1],
    )
    with pytest.raises(ValueError, match=r"needs rollout.greedy_baseline=true"):
        ADVANTAGES["greedy_baseline"].bind({})(inputs)
    with pytest.raises(ValueError, match=r"not every sample tells its turns"):
        ADVANTAGES["group_in_group"].bind({})(inputs)


COMPARING = [name for name in ADVANTAGES if name != "plain_reward"]


@pytest.mark.parametrize("name", COMPARING)
def test_equal_rewards_give_zero_not_nan(name):
    assert estimate(name, [0.3] * 4, [0, 0, 0, 1]) == pytest.approx([0] * 4, abs=1e-6)


@pytest.mark.parametrize("name", ["group_normalized", "group_centered", "leave_one_out"])
def test_a_group_of_one_has_no_baseline_and_gets_zero(name):
    assert estimate(name, [5.0, 1.0, 0.0], [0, 1, 1])[0] == 0


SCALE_FREE = (
    *("group_normalized", "batch_normalized", "group_mean_batch_std"),
    *("component_normalized", "group_in_group"),
)
BATCHES = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.25, 1.0]), st.integers(1, 5)),
    min_size=2,
    max_size=24,
)


@pytest.mark.parametrize("name", COMPARING)
@settings(max_examples=30, deadline=None)
@given(data=BATCHES, order=st.randoms(use_true_random=False))
def test_order_shift_and_scale(name, data, order):
    """Samples may come in any order; a constant added to all rewards changes nothing; a factor
    changes nothing where a spread is divided by, and is passed on where none is."""
    groups, rewards, tokens = (list(column) for column in zip(*data, strict=True))
    found = estimate(name, rewards, groups, tokens, baselines=[0.5] * len(data))
    places = list(range(len(data)))
    order.shuffle(places)
    changed = [4 * rewards[i] + 2 for i in places]
    again = estimate(
        name,
        changed,
        [groups[i] for i in places],
        [tokens[i] for i in places],
        baselines=[4 * 0.5 + 2] * len(data),
    )
    factor = 1 if name in SCALE_FREE else 4
    for value, i in zip(again, places, strict=True):
        assert value == pytest.approx(factor * found[i], abs=2e-5)
