"""Corrections of what was sampled by another policy than the trainer's old one: a factor per token.

    weights(inputs: LossInputs, config: Config) -> CorrectionOutput

w = pi_old / pi_rollout, trainer over engine, detached: numerics, quantisation and staleness. With
`old_logprobs` recomputed by the trainer, w times PPO's clip of pi / pi_old is decoupled PPO (AReaL,
arXiv 2505.24298). Adding one is one file and one row here.
"""

from framework.algorithm.corrections import (
    fresh,
    geometric,
    none,
    off_policy_sequence,
    sequence,
    token,
)
from framework.algorithm.rows import Row

CORRECTIONS: dict[str, Row] = {
    "none": Row(none.weights, none.Config),
    "token": Row(token.weights, token.Config),
    "sequence": Row(sequence.weights, sequence.Config),
    "geometric": Row(geometric.weights, geometric.Config),
    "off_policy_sequence": Row(off_policy_sequence.weights, off_policy_sequence.Config),
    "fresh": Row(fresh.weights, fresh.Config),
}
