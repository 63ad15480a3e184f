"""Losses: per token, unreduced, pure. One file each: its `Config` of knobs and its `loss`.

    loss(inputs: LossInputs, config: Config) -> LossOutput

r is the policy ratio exp(policy_logprobs - old_logprobs), A the advantage. The reduction is not
theirs, see `framework.algorithm.aggregation`. A loss that treats some tokens of the whole update
apart has `scores(inputs: SelectionInputs, config: Config)` too. Adding one is one file and one row
here.
"""

from framework.algorithm.losses import (
    cispo,
    clip_cov,
    generalized_jsd,
    gmpo,
    gspo,
    kl_cov,
    negative_log_likelihood,
    policy_gradient,
    ppo_clip,
    sapo,
)
from framework.algorithm.rows import Row

LOSSES: dict[str, Row] = {
    "ppo_clip": Row(ppo_clip.loss, ppo_clip.Config),
    "policy_gradient": Row(policy_gradient.loss, policy_gradient.Config),
    "gspo": Row(gspo.loss, gspo.Config),
    "cispo": Row(cispo.loss, cispo.Config),
    "sapo": Row(sapo.loss, sapo.Config),
    "gmpo": Row(gmpo.loss, gmpo.Config),
    "clip_cov": Row(clip_cov.loss, clip_cov.Config, clip_cov.scores),
    "kl_cov": Row(kl_cov.loss, kl_cov.Config, kl_cov.scores),
    "generalized_jsd": Row(generalized_jsd.loss, generalized_jsd.Config, teacher_top=True),
    "negative_log_likelihood": Row(negative_log_likelihood.loss, negative_log_likelihood.Config),
}
