"""GiGPO's advantage by hand, and against the paper's equations on plain lists."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.algorithm.advantages import ADVANTAGES
from framework.algorithm.inputs import AdvantageInputs, Turns


def test_group_in_group_by_hand():
    """Group 3: two answers that meet in state b, one of them twice; group 4 by itself."""
    inputs = AdvantageInputs(
        rewards=torch.tensor([1.0, 0.0, 0.5]),
        group_ids=torch.tensor([3, 3, 4]),
        response_lengths=[5, 6, 2],
        num_loss_tokens=[3, 3, 1],
        turns=[
            Turns(starts=[0, 3], states=["a", "b"], rewards=[0.0, 1.0]),
            Turns(starts=[0, 2, 4], states=["a", "b", "b"], rewards=[0.0, 0.25, -0.5]),
            Turns(starts=[0], states=["b"], rewards=[0.5]),
        ],
    )
    # Returns at gamma .5; answer 1 earned .25 beyond its turns' -.25, which its last turn gets.
    first, second = [0.5, 1.0], [0.0625, 0.125, -0.25]
    a = (0.5 + 0.0625) / 2
    b = (1.0 + 0.125 - 0.25) / 3
    knobs = {"gamma": 0.5, "step_weight": 2.0, "normalize": False}
    found = ADVANTAGES["group_in_group"].bind(knobs)(inputs)
    turn = [0.5 + 2 * (first[0] - a), 0.5 + 2 * (first[1] - b)]
    assert found[0].tolist() == pytest.approx([*[turn[0]] * 3, *[turn[1]] * 2])
    turn = [-0.5 + 2 * (value - mean) for value, mean in zip(second, (a, b, b), strict=True)]
    assert found[1].tolist() == pytest.approx([value for value in turn for _ in "xx"])
    assert found[2].tolist() == [0, 0]  # alone in its group
    spread = math.sqrt(sum((value - b) ** 2 for value in (1.0, 0.125, -0.25)) / 2)
    found = ADVANTAGES["group_in_group"].bind({"gamma": 0.5, "std_eps": 1e-12})(inputs)
    assert found[0][4].item() == pytest.approx(math.sqrt(0.5) + (1.0 - b) / spread)
    # Without turns that tell: only answers are compared.
    plain = ADVANTAGES["group_in_group"].bind({"step_weight": 0.0, "std_eps": 1e-6})(inputs)
    grpo = ADVANTAGES["group_normalized"].bind({})(inputs)
    assert all(torch.equal(one, other) for one, other in zip(plain, grpo, strict=True))


EPISODES = st.lists(
    st.tuples(
        st.integers(0, 2),  # group
        st.lists(
            st.tuples(st.sampled_from("xyz"), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 3)),
            min_size=1,
            max_size=4,
        ),  # turns: state, reward, tokens
        st.sampled_from([0.0, -1.0]),  # beyond them
    ),
    min_size=1,
    max_size=10,
)


def gigpo_by_loop(episodes, gamma, weight):
    """The paper's equations on lists: the advantage of each token of each episode."""

    def relative(value, others):
        return value - sum(others) / len(others)

    totals = [sum(paid for _, paid, _ in turns) + rest for _, turns, rest in episodes]
    returns = []
    for _, turns, rest in episodes:
        paid = [reward for _, reward, _ in turns]
        paid[-1] += rest
        returns.append(
            [sum(gamma ** (j - k) * paid[j] for j in range(k, len(paid))) for k in range(len(paid))]
        )
    found = []
    for i, (group, turns, _) in enumerate(episodes):
        peers = [j for j, each in enumerate(episodes) if each[0] == group]
        whole = relative(totals[i], [totals[j] for j in peers])
        tokens = []
        for k, (state, _, count) in enumerate(turns):
            met = [
                returns[j][m] for j in peers for m, t in enumerate(episodes[j][1]) if t[0] == state
            ]
            tokens += [whole + weight * relative(returns[i][k], met)] * count
        found.append(tokens)
    return found


@settings(max_examples=60, deadline=None)
@given(EPISODES, st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 1.0, 2.0]))
def test_group_in_group_is_the_papers(episodes, gamma, weight):
    """States that are met once, by one episode or by many; groups and turns of any number."""
    lengths = [sum(count for *_, count in turns) for _, turns, _ in episodes]
    inputs = AdvantageInputs(
        rewards=torch.tensor([sum(r for _, r, _ in turns) + rest for _, turns, rest in episodes]),
        group_ids=torch.tensor([group for group, *_ in episodes]),
        response_lengths=lengths,
        num_loss_tokens=lengths,
        turns=[
            Turns(
                starts=[sum(count for *_, count in turns[:k]) for k in range(len(turns))],
                states=[state for state, *_ in turns],
                rewards=[reward for _, reward, _ in turns],
            )
            for _, turns, _ in episodes
        ],
    )
    knobs = {"gamma": gamma, "step_weight": weight, "normalize": False}
    found = ADVANTAGES["group_in_group"].bind(knobs)(inputs)
    for ours, wanted in zip(found, gigpo_by_loop(episodes, gamma, weight), strict=True):
        assert ours.tolist() == pytest.approx(wanted, abs=1e-6)
