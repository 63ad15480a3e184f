"""Whether a run has a critic, and what it then needs."""

import dataclasses
from collections.abc import Iterator

from framework.config import RunConfig
from framework.config_critic import CriticConfig
from framework.source_facts import table_keys

TABLE = ("critic", "VALUE_ADVANTAGES", "advantages")
"""Folder, table and function, as framework.algorithm_checks.ROWS has them."""


def value_advantages() -> tuple[str, ...]:
    """Rows of VALUE_ADVANTAGES."""
    return table_keys("framework", "algorithm/critic/__init__.py", TABLE[1])


def uses_critic(config: RunConfig) -> bool:
    """Whether a run trains a critic."""
    return config.stage == "rl" and config.algorithm.advantage in value_advantages()


def critic_errors(config: RunConfig) -> Iterator[str]:
    """One line for everything that is set for nobody or cannot work."""
    critic, name = config.critic, config.algorithm.advantage
    if not uses_critic(config):
        for each in dataclasses.fields(CriticConfig):
            if (value := getattr(critic, each.name)) != each.default:
                yield (
                    f"critic.{each.name}={value}: algorithm.advantage={name} has no critic; set "
                    f"one of {', '.join(value_advantages())}"
                )
        return
    if config.parallel.fsdp:
        yield f"parallel.fsdp=True: not with a critic (algorithm.advantage={name}); set it to false"
    for key in ("gamma", "lam", "turn_gamma"):
        value = config.algorithm.advantage_args.get(key, 0)
        if isinstance(value, int | float) and value > 1:
            yield f"algorithm.advantage_args.{key}={value}: must be in [0, 1]"
    if critic.policy_starts_at_step >= config.num_steps:
        yield (
            f"critic.policy_starts_at_step={critic.policy_starts_at_step}: the policy would never "
            f"learn; less than num_steps={config.num_steps}"
        )
