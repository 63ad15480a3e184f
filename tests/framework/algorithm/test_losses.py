"""Every loss: a value and a gradient by hand, and against the paper's formula in plain python.

`FORMULAS` states each objective as the papers do, over whole sequences, in python floats; its
gradient is taken by central differences. Ours must agree in value and in gradient.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.algorithm.aggregation import token_weights
from framework.algorithm.inputs import LossInputs, Sequences
from framework.algorithm.losses import LOSSES


def loss_inputs(policy, old, advantages, ids=None, mask=None, rollout=None, dtype=torch.float32):
    count = len(old)
    ids = ids or [0] * count
    mask = torch.tensor(mask or [1.0] * count, dtype=dtype)
    policy = torch.tensor(policy, dtype=dtype, requires_grad=True)
    return LossInputs(
        policy_logprobs=policy,
        old_logprobs=torch.tensor(old, dtype=dtype),
        rollout_logprobs=torch.tensor(rollout or old, dtype=dtype),
        advantages=torch.tensor(advantages, dtype=dtype),
        loss_mask=mask,
        entropy=torch.zeros(count, dtype=dtype),
        sequences=Sequences(ids=torch.tensor(ids), count=max(ids) + 1, mask=mask),
        staleness=torch.zeros(count, dtype=dtype),
        selected=torch.zeros(count, dtype=dtype),
    )


def evaluate(name, inputs, **knobs):
    output = LOSSES[name].bind(knobs)(inputs)
    output.loss.sum().backward()
    gradient = inputs.policy_logprobs.grad
    assert gradient is not None
    return output, gradient


def log(*values):
    return [math.log(value) for value in values]


def test_ppo_clip_by_hand():
    # ratios: 1, 1.5 (clipped up for A > 0), 0.5 (clipped down for A < 0), 1.5 with A < 0 (kept)
    inputs = loss_inputs(log(1, 1.5, 0.5, 1.5), [0.0] * 4, [2.0, 2.0, -2.0, -2.0])
    output, gradient = evaluate("ppo_clip", inputs, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(output.loss, torch.tensor([-2.0, -2.6, 1.6, 3.0]))
    # d(-r A)/d log pi = -r A where the clip does not bind, 0 where it does
    torch.testing.assert_close(gradient, torch.tensor([-2.0, 0.0, 0.0, 3.0]))
    assert output.metrics["clip_fraction"].tolist() == [0.0, 1.0, 1.0, 0.0]


def test_dual_clip_by_hand():
    # A = -2 and c = 3: no loss above 6, and no gradient there; A > 0 is not touched
    inputs = loss_inputs(log(2, 5, 5), [0.0] * 3, [-2.0, -2.0, 2.0])
    output, gradient = evaluate("ppo_clip", inputs, dual_clip=3.0)
    torch.testing.assert_close(output.loss, torch.tensor([4.0, 6.0, -2.4]))
    torch.testing.assert_close(gradient, torch.tensor([4.0, 0.0, 0.0]))
    assert output.metrics["dual_clip_fraction"].tolist() == [0.0, 1.0, 0.0]


def test_policy_gradient_by_hand():
    inputs = loss_inputs([-1.0, -2.0], [-9.0, -9.0], [0.5, -1.0])
    output, gradient = evaluate("policy_gradient", inputs)
    assert output.loss.tolist() == [0.5, -2.0]
    assert gradient.tolist() == [-0.5, 1.0]


def test_negative_log_likelihood_by_hand():
    output, gradient = evaluate(
        "negative_log_likelihood", loss_inputs([-1.5, -0.5], [0.0, 0.0], [0.0, 7.0])
    )
    assert output.loss.tolist() == [1.5, 0.5]
    assert gradient.tolist() == [-1.0, -1.0]


def test_gspo_by_hand():
    # Sequence 0: ratios 2 and 8, s = 4, above 1.1 with A > 0: clipped. Sequence 1: s = 1 from 2
    # and .5: kept, and each token's gradient is -s A. The masked token counts in no mean.
    inputs = loss_inputs(
        log(2, 8, 100, 2, 0.5),
        [0.0] * 5,
        [1.0, 1.0, 1.0, 3.0, 3.0],
        [0, 0, 0, 1, 1],
        [1.0, 1, 0, 1, 1],
    )
    output, gradient = evaluate("gspo", inputs, clip_low=0.1, clip_high=0.1)
    torch.testing.assert_close(output.loss[[0, 1, 3, 4]], torch.tensor([-1.1, -1.1, -3, -3]))
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0, 0, -3, -3]))
    torch.testing.assert_close(output.metrics["sequence_ratio"][:2], torch.tensor([4.0, 4.0]))


def test_cispo_by_hand():
    # A token beyond the bound keeps a gradient: the bound times the advantage.
    inputs = loss_inputs(log(0.5, 2), log(0.25, 4), [1.0, -1.0])  # ratios 2 and .5
    output, gradient = evaluate("cispo", inputs, clip_low=0.2, clip_high=0.3)
    expected = [-1.3 * math.log(0.5), 0.8 * math.log(2)]
    torch.testing.assert_close(output.loss, torch.tensor(expected))
    torch.testing.assert_close(gradient, torch.tensor([-1.3, 0.8]))


def test_sapo_by_hand():
    # At ratio 1 the gate is 1/2: loss -2 A / tau, gradient -A whatever tau. At ratio 2, tau 1:
    # f = 4 sigmoid(1), f' = 4 sigmoid(1) (1 - sigmoid(1)), and d/d log pi gives another factor 2.
    inputs = loss_inputs(log(1, 1, 2), [0.0] * 3, [3.0, -3.0, 1.0])
    output, gradient = evaluate("sapo", inputs, temperature_positive=1.0, temperature_negative=2.0)
    gate = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(output.loss, torch.tensor([-6.0, 3.0, -4 * gate]))
    torch.testing.assert_close(gradient, torch.tensor([-3.0, 3.0, -8 * gate * (1 - gate)]))


def test_gmpo_by_hand():
    # Ratios 4 (clipped to 2) and 1/2 with A > 0: geometric mean 1; the clipped token has no
    # gradient, the other -A g.
    bound = math.log(2)
    inputs = loss_inputs(log(4, 0.5), [0.0, 0.0], [3.0, 3.0])
    output, gradient = evaluate("gmpo", inputs, clip_log_low=bound, clip_log_high=bound)
    torch.testing.assert_close(output.loss, torch.tensor([-3.0, -3.0]))
    torch.testing.assert_close(gradient, torch.tensor([0.0, -3.0]))


def test_ratio_losses_at_the_old_policy_are_the_policy_gradient():
    for name in ("ppo_clip", "gspo", "cispo", "sapo", "gmpo"):
        _, gradient = evaluate(name, loss_inputs([-1.0, -2.0], [-1.0, -2.0], [0.7, 0.7]))
        torch.testing.assert_close(gradient, torch.tensor([-0.7, -0.7]), msg=name)


# The papers' objectives of one sequence: ratios, log-probs and the advantage of all its tokens.


def clip(value, low, high):
    return min(max(value, low), high)


def ppo_formula(ratios, logprobs, advantage):
    terms = [min(r * advantage, clip(r, 0.8, 1.3) * advantage) for r in ratios]
    return -sum(terms) / len(terms)


def dual_formula(ratios, logprobs, advantage):
    terms = [-min(r * advantage, clip(r, 0.8, 1.3) * advantage) for r in ratios]
    if advantage < 0:
        terms = [min(term, -1.5 * advantage) for term in terms]
    return sum(terms) / len(terms)


def gspo_formula(ratios, logprobs, advantage):
    ratio = math.prod(ratios) ** (1 / len(ratios))
    return -min(ratio * advantage, clip(ratio, 0.9, 1.1) * advantage)


def gmpo_formula(ratios, logprobs, advantage):
    low, high = math.exp(-0.2), math.exp(0.3)
    kept = [min(r * advantage, clip(r, low, high) * advantage) / advantage for r in ratios]
    return -advantage * math.prod(kept) ** (1 / len(kept))


def sapo_formula(ratios, logprobs, advantage):
    tau = 1.0 if advantage > 0 else 1.05
    terms = [4 / tau / (1 + math.exp(-tau * (r - 1))) * advantage for r in ratios]
    return -sum(terms) / len(terms)


def gradient_formula(ratios, logprobs, advantage):
    return -sum(logprobs) / len(logprobs) * advantage


def likelihood_formula(ratios, logprobs, advantage):
    return -sum(logprobs) / len(logprobs)


FORMULAS = {
    "ppo_clip": (ppo_formula, {"clip_low": 0.2, "clip_high": 0.3}),
    "ppo_clip dual": (dual_formula, {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.5}),
    "gspo": (gspo_formula, {"clip_low": 0.1, "clip_high": 0.1}),
    "gmpo": (gmpo_formula, {"clip_log_low": 0.2, "clip_log_high": 0.3}),
    "sapo": (sapo_formula, {}),
    "policy_gradient": (gradient_formula, {}),
    "negative_log_likelihood": (likelihood_formula, {}),
}  # cispo's detached weight has no objective whose gradient this would be: by hand above

SEQUENCES = st.lists(
    st.tuples(
        st.lists(st.tuples(st.floats(-3, -0.01), st.floats(-0.6, 0.6)), min_size=1, max_size=5),
        st.sampled_from([-1.5, -0.4, 0.3, 2.0]),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("case", FORMULAS)
@settings(max_examples=25, deadline=None)
@given(sequences=SEQUENCES)
def test_value_and_gradient_are_the_papers(case, sequences):
    formula, knobs = FORMULAS[case]
    policy = [[logprob for logprob, _ in tokens] for tokens, _ in sequences]
    old = [[logprob - shift for logprob, shift in tokens] for tokens, _ in sequences]

    def objective(values):
        terms = []
        for new, before, (_, advantage) in zip(values, old, sequences, strict=True):
            ratios = [math.exp(a - b) for a, b in zip(new, before, strict=True)]
            terms.append(formula(ratios, new, advantage))
        return sum(terms) / len(terms)

    ids = [i for i, tokens in enumerate(policy) for _ in tokens]
    inputs = loss_inputs(
        [value for tokens in policy for value in tokens],
        [value for tokens in old for value in tokens],
        [sequences[i][1] for i in ids],
        ids,
        dtype=torch.float64,
    )
    weights = torch.tensor(
        [
            token_weights(
                "sequence_mean",
                num_loss_tokens=len(policy[i]),
                global_tokens=len(ids),
                global_sequences=len(policy),
            )
            for i in ids
        ],
        dtype=torch.float64,
    )
    total = (LOSSES[case.split()[0]].bind(knobs)(inputs).loss * weights).sum()
    total.backward()
    assert total.item() == pytest.approx(objective(policy), abs=1e-9)
    gradient = inputs.policy_logprobs.grad
    assert gradient is not None
    found = iter(gradient.tolist())
    step = 1e-6
    for i, tokens in enumerate(policy):
        for t in range(len(tokens)):
            up, down = ([list(each) for each in policy] for _ in range(2))
            up[i][t] += step
            down[i][t] -= step
            one_sided = [objective(up) - objective(policy), objective(policy) - objective(down)]
            if abs(one_sided[0] - one_sided[1]) > step * 1e-3:
                next(found)  # on a kink of a clip both slopes are right
                continue
            assert next(found) == pytest.approx(sum(one_sided) / (2 * step), abs=1e-6)


# With a teacher's tokens: test_generalized_jsd.py.
@pytest.mark.parametrize("name", [name for name, row in LOSSES.items() if not row.teacher_top])
def test_masked_and_single_tokens_give_finite_values(name):
    """A micro-batch of padding alone, a sequence without policy tokens, one of a single token."""
    inputs = loss_inputs(
        [-1.0, -2.0, -0.5], [-1.0, -2.5, -0.4], [0.0, 0.0, 1.0], [0, 0, 1], [0.0, 0.0, 1.0]
    )
    output, gradient = evaluate(name, inputs)
    assert output.loss.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient[2] != 0
