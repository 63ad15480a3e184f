"""Against which policy ratios are taken: by hand, and through the objective."""

import dataclasses
import math

import torch
from test_losses import log, loss_inputs

from framework.algorithm.proximal import PROXIMALS
from framework.config import AlgorithmConfig, RunConfig
from framework.objective import build_objective


def stale_inputs():
    """Engine 1/2, trainer's old policy 1/4, the policy now 1/8; tokens 0, 1, 2, 4 versions old."""
    inputs = loss_inputs(log(*[1 / 8] * 4), log(*[1 / 4] * 4), [1.0] * 4, rollout=log(*[1 / 2] * 4))
    return dataclasses.replace(inputs, staleness=torch.tensor([0.0, 1.0, 2.0, 4.0]))


def test_log_linear_by_hand():
    # Shares 0, 0, 1/2 and 3/4 of the way from 1/2 to 1/8, which are two halvings.
    found = PROXIMALS["log_linear"](stale_inputs())
    expected = log(0.5, 0.5, 0.25, 0.5 * 2**-1.5)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert not found.requires_grad


def test_trainer_and_engine_take_what_was_measured():
    inputs = stale_inputs()
    assert PROXIMALS["trainer"](inputs) is inputs.old_logprobs
    assert PROXIMALS["engine"](inputs) is inputs.rollout_logprobs


def test_the_objective_takes_ratios_against_it():
    """CISPO's detached weight is the ratio itself: policy / proximal, times proximal / engine."""

    def losses(**fields):
        config = AlgorithmConfig(loss="cispo", loss_args={"clip_high": 9.0}, **fields)
        output = build_objective(RunConfig(algorithm=config))(stale_inputs())
        return (output.loss / math.log(8)).detach()

    def close(values, expected):
        torch.testing.assert_close(values, torch.tensor(expected))

    close(losses(), [0.5] * 4)
    close(losses(old_logprobs="engine"), [0.25] * 4)
    close(losses(old_logprobs="log_linear"), [0.25, 0.25, 0.5, 0.25 * 2**1.5])
    corrected = losses(old_logprobs="log_linear", correction="token")
    close(corrected, [0.25] * 4)
