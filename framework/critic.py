"""From a run's configuration to its critic, and to the credit that tokens get."""

import dataclasses
from pathlib import Path
from typing import Any

from framework.algorithm.critic import VALUE_ADVANTAGES
from framework.algorithm.returns import RETURN_ADVANTAGES
from framework.algorithm.running_std import RunningStd
from framework.checkpoints import Checkpoint
from framework.config import RunConfig
from framework.critic_checks import credits_tokens, uses_critic


def build_critic(config: RunConfig, mesh: Any, found: Checkpoint | None) -> Any:
    """The critic, from the checkpoint if there is one; None where the algorithm has none."""
    if not uses_critic(config):
        return None
    from framework.megatron.checkpoint import load_critic, load_weights
    from framework.megatron.critic import Critic
    from framework.megatron.model import build_policy, read_hf_config
    from framework.megatron.sharded_state import blank_weights
    from megatron_bridge.load import load_hf, load_hf_body
    from megatron_bridge.models.score_head import has_score_head, score_config
    from megatron_bridge.torch_dist import is_torch_dist

    model, critic = config.model, config.critic
    hf_config = score_config(read_hf_config(model.hf_path))
    first = Path(critic.init_from or model.init_from or model.hf_path).expanduser()

    def fill(chunks: list[Any]) -> None:
        if found is not None:
            blank_weights(chunks)
            return
        if is_torch_dist(str(first)):
            load_weights(str(first), chunks, hf_config)
            return
        load = load_hf if has_score_head(read_hf_config(first)) else load_hf_body
        load(chunks, first, mesh.layout, mesh.coords, model.vocab_pad_multiple, hf_config)

    optimizer = dataclasses.replace(config.optimizer, lr=critic.lr)
    built = build_policy(hf_config, model, config.parallel, optimizer, mesh, fill, config.memory)
    if found is not None:
        load_critic(found, built)
    return Critic(built, mesh, critic)


def build_credit(config: RunConfig, mesh: Any, found: Checkpoint | None) -> Any:
    """What gives tokens their advantages; None where they come from metadata alone."""
    if not credits_tokens(config):
        return None
    from framework.megatron.credit import RewardKl, TokenCredit

    algorithm, valued = config.algorithm, uses_critic(config)
    row = (VALUE_ADVANTAGES if valued else RETURN_ADVANTAGES)[algorithm.advantage]
    penalty = RewardKl(
        coefficient=algorithm.kl_reward_coef,
        target=algorithm.kl_reward_target,
        horizon=algorithm.kl_reward_horizon,
    )
    credit = TokenCredit(
        mesh=mesh,
        estimate=row.bind(algorithm.advantage_args),
        whiten=config.critic.whiten or not valued,
        valued=valued,
        kl=penalty if algorithm.kl_reward_coef else None,
        scale=RunningStd() if config.critic.scale_rewards else None,
        norm=RunningStd() if config.critic.normalize_values else None,
    )
    if found is not None:
        credit.restore(found.manifest.adapted)
    return credit
