"""What stands at tokens that the policy did not write is nobody's, however odd it is."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import loss_inputs

from framework.algorithm.corrections import CORRECTIONS
from framework.algorithm.inputs import LossInputs
from framework.algorithm.kl import KL_ESTIMATORS
from framework.algorithm.losses import LOSSES
from framework.algorithm.proximal import PROXIMALS
from framework.config import AlgorithmConfig, RunConfig
from framework.objective import build_objective

ALGORITHMS = [
    *({"loss": name} for name, row in LOSSES.items() if not row.teacher_top),
    *({"correction": name} for name in CORRECTIONS),
    *({"kl_coef": 0.1, "kl_estimator": name} for name in KL_ESTIMATORS),
    *({"old_logprobs": name} for name in PROXIMALS),
]
LOGPROB = st.floats(-9, -0.01)
ODD = st.sampled_from([0.0, -1.0, -300.0, -1e4])
TOKENS = st.lists(
    st.tuples(*[LOGPROB] * 4, st.sampled_from([-1.0, 0.5]), st.booleans(), *[ODD] * 4),
    min_size=1,
    max_size=6,
)


def inputs_of(tokens: list, odd: bool) -> LossInputs:
    """Two sequences; what the policy did not write is calm, or odd."""
    columns = [[*each[:4]] if each[5] or not odd else [*each[6:]] for each in tokens]
    policy, old, rollout, ref = ([*column] for column in zip(*columns, strict=True))
    inputs = loss_inputs(
        policy,
        old,
        [each[4] * each[5] for each in tokens],
        [2 * i // len(tokens) for i in range(len(tokens))],
        [float(each[5]) for each in tokens],
        rollout,
    )
    return dataclasses.replace(inputs, ref_logprobs=torch.tensor(ref))


@pytest.mark.parametrize(
    "algorithm", ALGORITHMS, ids=lambda each: "-".join(map(str, each.values()))
)
@settings(max_examples=25, deadline=None)
@given(tokens=TOKENS)
def test_they_change_no_value_no_gradient_and_no_figure(algorithm, tokens):
    """A prompt's token whose odds have changed by e^300 is one that nobody trained."""
    objective = build_objective(RunConfig(algorithm=AlgorithmConfig(**algorithm)))
    seen = []
    for odd in (False, True):
        inputs = inputs_of(tokens, odd)
        output = objective(inputs)
        total = (output.loss * inputs.loss_mask).sum()
        total.backward()
        gradient = inputs.policy_logprobs.grad
        assert gradient is not None
        figures = {name: (each * inputs.loss_mask).sum() for name, each in output.metrics.items()}
        seen.append({"loss": total.detach(), "gradient": gradient, **figures})
        assert all(each.isfinite().all() for each in seen[-1].values())
        assert not gradient[inputs.loss_mask == 0].any()
    for name, calm in seen[0].items():
        torch.testing.assert_close(seen[1][name], calm, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", [name for name in CORRECTIONS if name != "fresh"])
@settings(max_examples=25, deadline=None)
@given(tokens=TOKENS)
def test_a_correction_does_nothing_where_trainer_and_engine_agree(name, tokens):
    inputs = inputs_of(tokens, odd=False)
    same = inputs.policy_logprobs.detach()
    inputs = dataclasses.replace(inputs, old_logprobs=same, rollout_logprobs=same)
    assert CORRECTIONS[name].bind({})(inputs).weights.tolist() == [1.0] * len(tokens)


@pytest.mark.parametrize("name", ["token", "sequence", "geometric"])
@settings(max_examples=25, deadline=None)
@given(tokens=TOKENS, high=st.floats(1.0, 5.0))
def test_no_weight_is_beyond_its_bound(name, tokens, high):
    """Whether capped or dropped; and the order of the sequences' tokens does not matter."""
    inputs = inputs_of(tokens, odd=False)
    for knobs in [{"high": high}] if name == "geometric" else [{"high": high}, {"mask": True}]:
        weights = CORRECTIONS[name].bind(knobs)(inputs).weights
        assert weights.isfinite().all()
        assert (weights >= 0).all()
        if name != "geometric":
            assert (weights <= knobs.get("high", 2.0) + 1e-6).all()
