"""SAPO: a soft gate in place of the clip."""

from dataclasses import dataclass

import torch

from framework.algorithm.inputs import LossInputs, LossOutput


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of sapo: the gate's temperatures; the larger, the sooner a ratio is damped."""

    temperature_positive: float = 1.0
    temperature_negative: float = 1.05


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """SAPO (arXiv 2511.20347): L_t = -f(r_t) A_t, f(r) = 4 / tau sigmoid(tau (r - 1)), with
    tau = temperature_positive where A_t > 0, else temperature_negative. f'(1) = 1: at the old
    policy this is the policy gradient. Normaliser of the paper: sequence_mean.
    """
    log_ratio = inputs.policy_logprobs - inputs.old_logprobs
    ratio = log_ratio.exp()
    gap = config.temperature_negative - config.temperature_positive
    temperature = config.temperature_positive + gap * (inputs.advantages <= 0).to(ratio.dtype)
    gate = torch.sigmoid(temperature * (ratio - 1))
    with torch.no_grad():
        metrics = {"gate_slope": 4 * gate * (1 - gate), "approx_kl": ratio - 1 - log_ratio}
    return LossOutput(loss=-4 / temperature * gate * inputs.advantages, metrics=metrics)
