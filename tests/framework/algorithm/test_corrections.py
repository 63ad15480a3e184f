"""Corrections by hand: which way round the ratio is, what is capped, what is dropped."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import log, loss_inputs

from framework.algorithm.corrections import CORRECTIONS
from framework.config import AlgorithmConfig, RunConfig
from framework.objective import build_objective, effective_sample_fraction


def correct(name, ratios, ids=None, written=None, **knobs):
    """Weights for trainer / engine ratios of the old policy."""
    count = len(ratios)
    inputs = loss_inputs(
        [0.0] * count, log(*ratios), [1.0] * count, ids, written, rollout=[0.0] * count
    )
    output = CORRECTIONS[name].bind(knobs)(inputs)
    assert not output.weights.requires_grad
    return output


def close(values, expected):
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float32))


def test_token_truncates_above_and_never_below():
    output = correct("token", [0.1, 1.5, 8.0], high=2.0)
    close(output.weights, [0.1, 1.5, 2.0])
    close(output.metrics["correction_truncated_fraction"], [0, 0, 1])


def test_token_mask_drops_both_sides():
    output = correct("token", [0.1, 1.5, 8.0], low=0.5, high=5.0, mask=True)
    close(output.weights, [0.0, 1.5, 0.0])
    close(output.metrics["correction_masked_fraction"], [1, 0, 1])


def test_sequence_is_the_product_over_the_policys_tokens():
    # Sequence 0: 2 * 3 = 6, capped at 4; the masked 100 does not count. Sequence 1: .5
    ratios, ids, written = [2, 3, 100, 0.5], [0, 0, 0, 1], [1.0, 1, 0, 1]
    close(correct("sequence", ratios, ids, written, high=4.0).weights, [4, 4, 4, 0.5])
    dropped = correct("sequence", ratios, ids, written, low=0.6, high=10.0, mask=True)
    close(dropped.weights, [6, 6, 6, 0])


def test_geometric_gates_on_the_mean_and_weighs_by_token():
    # Sequence 0: sqrt(2 * .5) = 1, inside. Sequence 1: 1.1, outside.
    output = correct("geometric", [2, 0.5, 1.1], [0, 0, 1], low=0.95, high=1.05)
    close(output.weights, [2, 0.5, 0])


def test_off_policy_sequence_drops_bad_answers_that_have_become_unlikely():
    # Trainer now / engine: sequence 0 log-mean (.5, 1) -> divergence .35; sequence 1: 1 -> 0.
    policy = log(0.5, 1, 1)
    for advantage, expected in ((-1.0, [0, 0, 1]), (1.0, [1, 1, 1])):
        inputs = loss_inputs(policy, [9.0] * 3, [advantage] * 3, [0, 0, 1], rollout=[0.0, 0.0, 0.0])
        output = CORRECTIONS["off_policy_sequence"].bind({"max_divergence": 0.3})(inputs)
        close(output.weights, expected)
        close(output.metrics["correction_masked_fraction"], [1 - kept for kept in expected])
    wide = CORRECTIONS["off_policy_sequence"].bind({"max_divergence": 0.4})(inputs)
    close(wide.weights, [1, 1, 1])


def test_fresh_drops_tokens_by_their_own_age():
    inputs = loss_inputs([0.0] * 3, [0.0] * 3, [1.0] * 3)
    inputs = dataclasses.replace(inputs, staleness=torch.tensor([0.0, 1.0, 2.0]))
    close(CORRECTIONS["fresh"].bind({})(inputs).weights, [1, 1, 0])
    close(CORRECTIONS["fresh"].bind({"max_versions": 0})(inputs).weights, [1, 0, 0])


def test_objective_weighs_the_loss_and_subtracts_entropy():
    config = RunConfig(
        algorithm=AlgorithmConfig(
            loss="policy_gradient",
            correction="token",
            correction_args={"high": 2.0},
            entropy_coef=0.1,
        )
    )
    inputs = loss_inputs([-1.0, -1.0], log(1, 4), [1.0, 1.0], rollout=[0.0, 0.0])
    inputs = dataclasses.replace(inputs, entropy=torch.tensor([0.5, 2.0]))
    output = build_objective(config)(inputs)
    close(output.loss.detach(), [1.0 - 0.05, 2.0 - 0.2])
    kl = [0.0, 4 - 1 - math.log(4)]
    close(output.metrics["rollout_kl"], kl)


def test_effective_sample_fraction_by_hand():
    # weights 1 and 3: (2)^2 / ((1 + 9) / 2) = .8
    figures = {"train/correction_weight": 2.0, "train/correction_weight_squared": 5.0}
    assert effective_sample_fraction(figures) == {
        "train/effective_sample_fraction": pytest.approx(0.8)
    }
    assert effective_sample_fraction({}) == {}


def token_formula(ratios, policy, advantage):
    return [min(ratio, 2.0) for ratio in ratios]


def masked_formula(ratios, policy, advantage):
    return [ratio if 0.5 <= ratio <= 2.0 else 0.0 for ratio in ratios]


def sequence_formula(ratios, policy, advantage):
    return [min(math.prod(ratios), 2.0)] * len(ratios)


def masked_sequence_formula(ratios, policy, advantage):
    whole = math.prod(ratios)
    return [whole if 0.5 <= whole <= 2.0 else 0.0] * len(ratios)


def geometric_formula(ratios, policy, advantage):
    mean = math.prod(ratios) ** (1 / len(ratios))
    return [ratio if 0.9 <= mean <= 1.2 else 0.0 for ratio in ratios]


def opsm_formula(ratios, policy, advantage):
    divergence = -sum(map(math.log, policy)) / len(policy)
    return [0.0 if advantage < 0 and divergence > 0.1 else 1.0] * len(ratios)


FORMULAS = {
    "token": (token_formula, {"high": 2.0}),
    "token mask": (masked_formula, {"low": 0.5, "high": 2.0, "mask": True}),
    "sequence": (sequence_formula, {"high": 2.0}),
    "sequence mask": (masked_sequence_formula, {"low": 0.5, "high": 2.0, "mask": True}),
    "geometric": (geometric_formula, {"low": 0.9, "high": 1.2}),
    "off_policy_sequence": (opsm_formula, {"max_divergence": 0.1}),
}
SEQUENCES = st.lists(
    st.tuples(
        st.lists(st.tuples(*[st.floats(0.2, 4.0)] * 2, st.booleans()), min_size=1, max_size=5),
        st.sampled_from([-1.0, 0.5]),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("case", FORMULAS)
@settings(max_examples=40, deadline=None)
@given(sequences=SEQUENCES)
def test_weights_are_the_formulas_in_sequences_of_any_length(case, sequences):
    """Old policy and policy over engine, token by token; others' tokens count in no product."""
    formula, knobs = FORMULAS[case]
    rows = [(i, *token) for i, (tokens, _) in enumerate(sequences) for token in tokens]
    ids, old, policy, written = (list(column) for column in zip(*rows, strict=True))
    inputs = loss_inputs(
        log(*policy),
        log(*old),
        [sequences[i][1] for i in ids],
        ids,
        [float(each) for each in written],
        rollout=[0.0] * len(ids),
        dtype=torch.float64,
    )
    weights = CORRECTIONS[case.split()[0]].bind(knobs)(inputs).weights
    found = [value for value, keep in zip(weights.tolist(), written, strict=True) if keep]
    wanted = []
    for tokens, advantage in sequences:
        kept = [token for token in tokens if token[2]]
        if kept:
            wanted += formula([a for a, _, _ in kept], [b for _, b, _ in kept], advantage)
    assert found == pytest.approx(wanted, rel=1e-9)
