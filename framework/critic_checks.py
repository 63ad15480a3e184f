"""Whether a run has a critic, and what it then needs."""

import dataclasses
from collections.abc import Iterator

from framework.advantage_tables import RETURNS, VALUED, advantage_table, flagged_advantages
from framework.config import RunConfig
from framework.config_critic import CriticConfig


def credits_tokens(config: RunConfig) -> bool:
    """Whether advantages come from rewards of tokens, after the trainer's passes."""
    return config.stage == "rl" and advantage_table(config.algorithm.advantage) in (VALUED, RETURNS)


def uses_critic(config: RunConfig) -> bool:
    """Whether a run trains a critic."""
    return config.stage == "rl" and advantage_table(config.algorithm.advantage) == VALUED


def critic_errors(config: RunConfig) -> Iterator[str]:
    """One line for everything that is set for nobody or cannot work."""
    critic, name = config.critic, config.algorithm.advantage
    if config.stage == "rl" and "." not in name:  # knobs of the user's own mean what they mean
        for key in ("gamma", "lam", "turn_gamma"):
            value = config.algorithm.advantage_args.get(key, 0)
            if isinstance(value, int | float) and value > 1:
                yield f"algorithm.advantage_args.{key}={value}: must be in [0, 1]"
    if not uses_critic(config):
        for each in dataclasses.fields(CriticConfig):
            if (value := getattr(critic, each.name)) != each.default:
                yield (
                    f"critic.{each.name}={value}: algorithm.advantage={name} has no critic; set "
                    f"one of {', '.join(VALUED.rows)}"
                )
        return
    if config.parallel.fsdp:
        yield f"parallel.fsdp=True: not with a critic (algorithm.advantage={name}); set it to false"
    if critic.policy_starts_at_step >= config.num_steps:
        yield (
            f"critic.policy_starts_at_step={critic.policy_starts_at_step}: the policy would never "
            f"learn; less than num_steps={config.num_steps}"
        )


def reward_kl_errors(config: RunConfig) -> Iterator[str]:
    """One line for every field of the KL penalty in the reward that cannot work."""
    algorithm = config.algorithm
    coefficient, target = algorithm.kl_reward_coef, algorithm.kl_reward_target
    key = f"algorithm.kl_reward_coef={coefficient:g}"
    if not coefficient:
        if target:
            yield f"algorithm.kl_reward_target={target:g}: nothing to adapt while {key}"
        return
    if algorithm.kl_coef:
        yield (
            f"{key}: the same divergence would count twice; set algorithm.kl_coef=0 (now "
            f"{algorithm.kl_coef:g}) or this"
        )
    if algorithm.advantage not in (able := flagged_advantages("token_rewards")):
        yield (
            f"{key}: algorithm.advantage={algorithm.advantage} knows no rewards of single tokens; "
            f"one of {', '.join(able)}, or algorithm.kl_coef"
        )
