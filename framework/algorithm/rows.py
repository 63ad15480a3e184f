"""A row of the tables LOSSES, ADVANTAGES and CORRECTIONS."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from framework.algorithm.inputs import SelectionInputs


class Selection(NamedTuple):
    """Which tokens of a whole update a loss treats apart: those with the largest scores."""

    scores: Callable[[SelectionInputs], torch.Tensor]
    """[T]; -inf where a token is no candidate."""
    share: float
    """Of the update's policy tokens, rounded down, at least one."""


class Row(NamedTuple):
    """A pure function `(inputs, config)` and the dataclass of its knobs."""

    function: Callable[[Any, Any], Any]
    config: type[Any]
    scores: Callable[[SelectionInputs, Any], torch.Tensor] | None = None
    """A loss that selects tokens; its config then has a `share`."""
    compares_group: bool = False
    """An advantage that compares samples of a prompt with each other."""
    token_rewards: bool = False
    """An advantage that takes rewards of single tokens, as algorithm.kl_reward_coef makes them."""
    teacher_top: bool = False
    """A loss that compares with a teacher's likeliest tokens (rollout.teacher_top_k)."""

    def bind(self, arguments: Mapping[str, Any]) -> Callable[[Any], Any]:
        """The function of inputs alone, with these knobs (the rest at their defaults)."""
        config = self.config(**arguments)
        return lambda inputs: self.function(inputs, config)

    def bind_selection(self, arguments: Mapping[str, Any]) -> Selection | None:
        """The selection of a loss that has one, with the same knobs."""
        if (scores := self.scores) is None:
            return None
        config = self.config(**arguments)
        return Selection(lambda inputs: scores(inputs, config), config.share)
