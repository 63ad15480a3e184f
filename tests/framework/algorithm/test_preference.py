"""Every preference loss: a value and a gradient by hand, and the paper's formula in plain python.

`FORMULAS` states each loss as its paper does, for one pair (or one labelled answer) in python
floats; its gradient is taken by central differences.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.algorithm.inputs import Sequences
from framework.algorithm.preference import PREFERENCE_LOSSES
from framework.algorithm.preference.inputs import Answers, LabelledInputs, PairInputs
from framework.algorithm.rows import Row


def answers(logprobs, ref, num_tokens):
    return Answers(
        logprobs=torch.tensor(logprobs, dtype=torch.float64, requires_grad=True),
        ref_logprobs=torch.tensor(ref, dtype=torch.float64),
        num_tokens=torch.tensor(num_tokens, dtype=torch.float64),
    )


def evaluate(name, inputs, **knobs):
    row = PREFERENCE_LOSSES[name]
    output = Row(row.function, row.config).bind(knobs)(inputs)
    output.loss.sum().backward()
    return output


def on_a_pair(name, chosen, rejected, **knobs):
    """chosen and rejected: (log-prob, of the reference, tokens); loss and its two derivatives."""
    c, r = answers(*([each] for each in chosen)), answers(*([each] for each in rejected))
    output = evaluate(name, PairInputs(chosen=c, rejected=r), **knobs)
    return output, (output.loss.item(), c.logprobs.grad.item(), r.logprobs.grad.item())


# The log-ratio of the chosen answer is log 2, that of the rejected one -log 2: D = log 4.
CHOSEN = (-4 + math.log(2), -4.0, 2)
REJECTED = (-6 - math.log(2), -6.0, 4)


def test_dpo_by_hand():
    # sigmoid(log 4) = 4/5: L = log 5/4, dL/dD = -1/5
    output, found = on_a_pair("dpo", CHOSEN, REJECTED, beta=1.0)
    assert found == pytest.approx((math.log(1.25), -0.2, 0.2))
    assert output.chosen_rewards.item() == pytest.approx(math.log(2))
    assert output.rejected_rewards.item() == pytest.approx(-math.log(2))
    assert output.correct.tolist() == [True]
    # beta = 1/2: sigmoid(log 2) = 2/3 and half of the slope
    _, found = on_a_pair("dpo", CHOSEN, REJECTED, beta=0.5)
    assert found == pytest.approx((math.log(1.5), -1 / 6, 1 / 6))


def test_cdpo_by_hand():
    # 3/4 of log 5/4 and 1/4 of log 5; slope -(3/4)/5 + (1/4) 4/5 = 1/20: already too sure
    _, found = on_a_pair("cdpo", CHOSEN, REJECTED, beta=1.0, label_smoothing=0.25)
    assert found == pytest.approx((0.75 * math.log(1.25) + 0.25 * math.log(5), 0.05, -0.05))


def test_ipo_by_hand():
    # Means a token: log 2 / 2 and -log 2 / 4, so D = 3/4 log 2; wanted: 1 / (2 beta) = 1
    distance = 0.75 * math.log(2) - 1
    _, found = on_a_pair("ipo", CHOSEN, REJECTED, beta=0.5)
    assert found == pytest.approx((distance**2, distance, -distance / 2))
    distance = math.log(4) - 1
    _, found = on_a_pair("ipo", CHOSEN, REJECTED, beta=0.5, per_token=False)
    assert found == pytest.approx((distance**2, 2 * distance, -2 * distance))


def test_rpo_by_hand():
    # DPO's, and twice the chosen answer's mean negative log-prob over its two tokens
    _, found = on_a_pair("rpo", CHOSEN, REJECTED, beta=1.0, alpha=2.0)
    assert found == pytest.approx((math.log(1.25) + 4 - math.log(2), -0.2 - 1, 0.2))


def test_simpo_by_hand():
    # Mean log-probs -1 and -1.5, beta 2: margin 1, gamma 1: sigmoid(0) = 1/2
    output, found = on_a_pair("simpo", (-2.0, 0.0, 2), (-6.0, 0.0, 4), beta=2.0, gamma=1.0)
    assert found == pytest.approx((math.log(2), -0.5, 0.25))
    assert output.chosen_rewards.item() == -2.0


def test_orpo_by_hand():
    # Mean probabilities 1/2 and 1/4: odds 1 and 1/3, ratio 3, sigmoid(log 3) = 3/4.
    # d log odds / dm = 1 / (1 - p): 2 and 4/3; dL = -1 - beta (1/4) 2, over two tokens.
    chosen, rejected = (-2 * math.log(2), 0.0, 2), (-8 * math.log(2), 0.0, 4)
    _, found = on_a_pair("orpo", chosen, rejected, beta=2.0)
    expected = (math.log(2) + 2 * math.log(4 / 3), (-1 - 1) / 2, 2 * 0.25 * (4 / 3) / 4)
    assert found == pytest.approx(expected)


def test_kto_by_hand():
    # Log-ratios log 4 with z = log 2: sigmoid(log 2) = 2/3. Good: 2 (1 - 2/3), slope -2 (2/9);
    # bad: 3 (1 - 1/3), slope 3 (2/9). The good one is on its side of z, the bad one is not.
    both = answers([-1 + math.log(4)] * 2, [-1.0] * 2, [3, 3])
    inputs = LabelledInputs(answers=both, desirable=torch.tensor([True, False]), kl=math.log(2))
    output = evaluate("kto", inputs, beta=1.0, desirable_weight=2.0, undesirable_weight=3.0)
    assert output.loss.tolist() == pytest.approx([2 / 3, 2])
    assert both.logprobs.grad.tolist() == pytest.approx([-4 / 9, 6 / 9])
    assert output.correct.tolist() == [True, False]
    assert output.chosen_rewards.tolist() == pytest.approx([math.log(4)])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def odds(mean):
    return math.exp(mean) / (1 - math.exp(mean))


FORMULAS = {
    # loss of a pair: log-probs of chosen and rejected, of the reference, numbers of tokens
    "dpo": lambda c, r, rc, rr, nc, nr: -math.log(sigmoid(0.1 * ((c - r) - (rc - rr)))),
    "cdpo": lambda c, r, rc, rr, nc, nr: (
        -0.9 * math.log(sigmoid(0.1 * ((c - r) - (rc - rr))))
        - 0.1 * math.log(sigmoid(-0.1 * ((c - r) - (rc - rr))))
    ),
    "ipo": lambda c, r, rc, rr, nc, nr: ((c - rc) / nc - (r - rr) / nr - 5) ** 2,
    "rpo": lambda c, r, rc, rr, nc, nr: -math.log(sigmoid(0.1 * ((c - r) - (rc - rr)))) - c / nc,
    "simpo": lambda c, r, rc, rr, nc, nr: -math.log(sigmoid(2 * (c / nc - r / nr) - 1)),
    "orpo": lambda c, r, rc, rr, nc, nr: (
        -c / nc - 0.1 * math.log(sigmoid(math.log(odds(c / nc) / odds(r / nr))))
    ),
}

LOGPROB = st.floats(-20, -0.1)


@settings(max_examples=25, deadline=None)
@given(*[LOGPROB] * 4, st.integers(1, 9), st.integers(1, 9))
@pytest.mark.parametrize("name", FORMULAS)
def test_pairs_agree_with_the_formula(name, c, r, rc, rr, nc, nr):
    _, found = on_a_pair(name, (c, rc, nc), (r, rr, nr))
    formula, h = FORMULAS[name], 1e-5
    expected = (
        formula(c, r, rc, rr, nc, nr),
        (formula(c + h, r, rc, rr, nc, nr) - formula(c - h, r, rc, rr, nc, nr)) / (2 * h),
        (formula(c, r + h, rc, rr, nc, nr) - formula(c, r - h, rc, rr, nc, nr)) / (2 * h),
    )
    assert found[0] == pytest.approx(expected[0], rel=1e-9)
    assert found[1:] == pytest.approx(expected[1:], rel=1e-5, abs=1e-7)


@given(LOGPROB, LOGPROB, st.floats(0, 5), st.booleans())
def test_kto_agrees_with_the_formula(logprob, ref, kl, good):
    one = answers([logprob], [ref], [2])
    inputs = LabelledInputs(answers=one, desirable=torch.tensor([good]), kl=kl)
    output = evaluate("kto", inputs)

    def formula(x):
        return 1 - sigmoid(0.1 * ((x - ref) - kl) * (1 if good else -1))

    assert output.loss.item() == pytest.approx(formula(logprob))
    slope = (formula(logprob + 1e-5) - formula(logprob - 1e-5)) / 2e-5
    assert one.logprobs.grad.item() == pytest.approx(slope, abs=1e-9)


@pytest.mark.parametrize("name", FORMULAS)
def test_an_answer_that_is_certain_or_impossible_gives_no_nan(name):
    for pair in (((0.0, 0.0, 1), (-1e4, 0.0, 1)), ((-1e4, 0.0, 1), (0.0, 0.0, 1))):
        _, found = on_a_pair(name, *pair)
        assert all(math.isfinite(value) for value in found)


@pytest.mark.parametrize("name", FORMULAS)
def test_only_the_reference_losses_feel_the_reference(name):
    _, one = on_a_pair(name, (-3.0, -2.0, 3), (-4.0, -2.5, 2))
    _, other = on_a_pair(name, (-3.0, -1.0, 3), (-4.0, -2.5, 2))
    assert (one == other) is not PREFERENCE_LOSSES[name].reference


def test_totals_of_a_cut_sequence_are_whole_and_their_gradient_is_our_own():
    """Two ranks hold two tokens each; what the other one has is added to value, not to gradient."""
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0])
    sequences = Sequences(
        ids=torch.tensor([0, 0, 1, 1]), count=2, mask=mask, add_up=lambda mine: mine + 100
    )
    totals = sequences.totals(values)
    assert totals.tolist() == [103.0, 108.0]
    (totals**2).sum().backward()
    assert values.grad.tolist() == [206.0, 206.0, 0.0, 216.0]
