"""The tasks by name: one file, one row here, one yaml in hydra_configs/data/."""

import inspect

from rollout.environments.bandit import BanditEnvironment
from rollout.environments.base import Environment
from rollout.environments.calculator import CalculatorEnvironment
from rollout.environments.countdown import CountdownEnvironment
from rollout.environments.frozen_lake import FrozenLakeEnvironment
from rollout.environments.guess import GuessEnvironment
from rollout.environments.gymnasium import GymnasiumEnvironment
from rollout.environments.jsonl import JsonlEnvironment
from rollout.environments.mcp import McpEnvironment
from rollout.environments.reasoning_gym import ReasoningGymEnvironment
from rollout.environments.sort import SortEnvironment
from rollout.environments.textarena import TextArenaEnvironment
from rollout.own_code import look_up

ENVIRONMENTS: dict[str, type[Environment]] = {
    "sort": SortEnvironment,
    "calculator": CalculatorEnvironment,
    "guess": GuessEnvironment,
    "bandit": BanditEnvironment,
    "frozen_lake": FrozenLakeEnvironment,
    "countdown": CountdownEnvironment,
    "reasoning_gym": ReasoningGymEnvironment,
    "gymnasium": GymnasiumEnvironment,
    "textarena": TextArenaEnvironment,
    "jsonl": JsonlEnvironment,
    "mcp": McpEnvironment,
}


def find_environment(name: str) -> type[Environment]:
    """A row by its name, or a class of the user's own: package.module.Class.

    Raises:
        ValueError: there is none such; one line, without the key.
    """
    found = look_up(ENVIRONMENTS, name, "Class")
    if not (isinstance(found, type) and issubclass(found, Environment)):
        raise ValueError("is no subclass of rollout.environments.base.Environment")
    if inspect.isabstract(found):
        raise ValueError(f"lacks {', '.join(sorted(found.__abstractmethods__))}")
    return found
