"""The tasks by name: one file, one row here, one yaml in hydra_configs/data/."""

from rollout.environments.base import Environment
from rollout.environments.reasoning_gym import ReasoningGymEnvironment
from rollout.environments.sort import SortEnvironment

ENVIRONMENTS: dict[str, type[Environment]] = {
    "sort": SortEnvironment,
    "reasoning_gym": ReasoningGymEnvironment,
}
