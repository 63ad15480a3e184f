"""KL estimators by hand, and in expectation against the divergence itself."""

import dataclasses
import math

import pytest
import torch
from test_losses import log, loss_inputs

from framework.algorithm.kl import KL_ESTIMATORS
from framework.config import AlgorithmConfig, RunConfig
from framework.objective import build_objective


def evaluate(name, policy, reference, old=None):
    inputs = loss_inputs(policy, old or policy, [0.0] * len(policy), dtype=torch.float64)
    inputs = dataclasses.replace(inputs, ref_logprobs=torch.tensor(reference, dtype=torch.float64))
    value = KL_ESTIMATORS[name](inputs)
    value.sum().backward()
    return value.tolist(), inputs.policy_logprobs.grad.tolist()


L = math.log(2)  # the policy twice as likely as the reference
K3 = 0.5 - 1 + L


@pytest.mark.parametrize(
    ("name", "value", "gradient"),
    [
        ("k2", L**2 / 2, L),
        ("k3", K3, 0.5),  # 1 - exp(-l)
        ("straight_through", K3, L),
        ("unbiased", 3 * K3, 3 * K3 + 3 * 0.5),  # on a sample of a policy with a third of pi
    ],
)
def test_by_hand(name, value, gradient):
    old = log(0.2) if name == "unbiased" else None
    found = evaluate(name, log(0.6), log(0.3), old)
    assert found == (pytest.approx([value]), pytest.approx([gradient]))


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_the_same_policy_is_zero_apart(name):
    assert evaluate(name, log(0.6, 0.1), log(0.6, 0.1)) == ([0.0, 0.0], [0.0, 0.0])


def test_which_gradients_are_those_of_the_divergence():
    """Over all tokens of a distribution, weighted by the policy: k2, straight-through and unbiased
    give the gradient of KL(pi || ref) by its logits, k3 does not; k3 has its value."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.5, -0.2], dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    divergence = (policy.exp() * (policy - reference)).sum()
    (wanted,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    right = {}
    for name, estimate in KL_ESTIMATORS.items():
        inputs = loss_inputs([0.0] * 3, [0.0] * 3, [0.0] * 3, dtype=torch.float64)
        inputs = dataclasses.replace(
            inputs,
            policy_logprobs=policy,
            old_logprobs=policy.detach(),
            ref_logprobs=reference,
        )
        mean = (policy.detach().exp() * estimate(inputs)).sum()
        (found,) = torch.autograd.grad(mean, logits, retain_graph=True)
        right[name] = torch.allclose(found, wanted, atol=1e-12)
        if name != "k2":
            assert mean.item() == pytest.approx(divergence.item())
    assert right == {"k2": True, "k3": False, "straight_through": True, "unbiased": True}


def test_the_objective_adds_it_by_its_coefficient():
    config = RunConfig(algorithm=AlgorithmConfig(loss="policy_gradient", kl_coef=0.1))
    inputs = loss_inputs(log(0.6), log(0.6), [0.0])
    inputs = dataclasses.replace(inputs, ref_logprobs=torch.tensor(log(0.3)))
    output = build_objective(config)(inputs)
    assert output.loss.item() == pytest.approx(0.1 * K3)
    assert output.metrics["reference_kl"].item() == pytest.approx(K3)
