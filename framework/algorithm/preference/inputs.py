"""What preference losses are given and return: whole answers, not tokens. Plain tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True, kw_only=True)
class Answers:
    """N answers of one micro-batch, [N] float64 each; log-probs are sums over the answer's tokens.

    Whole also where context parallelism cuts the sequences.
    """

    logprobs: torch.Tensor
    """Of the policy; carries the gradient."""
    num_tokens: torch.Tensor
    """Tokens that were summed, at least 1."""
    ref_logprobs: torch.Tensor | None = None
    """Of the reference policy, for losses that have one."""

    @property
    def mean_logprobs(self) -> torch.Tensor:
        """[N]: log-prob a token."""
        return self.logprobs / self.num_tokens

    @property
    def log_ratios(self) -> torch.Tensor:
        """[N]: log pi(y|x) - log pi_ref(y|x)."""
        assert self.ref_logprobs is not None, "this loss was not declared to need a reference"
        return self.logprobs - self.ref_logprobs


@dataclass(frozen=True, kw_only=True)
class PairInputs:
    """N pairs: chosen[i] and rejected[i] answer the same prompt."""

    chosen: Answers
    rejected: Answers


@dataclass(frozen=True, kw_only=True)
class LabelledInputs:
    """N answers to N prompts, each called good or bad by itself."""

    answers: Answers
    desirable: torch.Tensor
    """[N] bool."""
    kl: float
    """Estimate of KL(pi || pi_ref) from unrelated answers, never negative; of the global batch."""


@dataclass(frozen=True, kw_only=True)
class PreferenceOutput:
    """What a preference loss returns. The reduction is the mean over the global batch."""

    loss: torch.Tensor
    """[N], unreduced: of each pair, or of each labelled answer."""
    chosen_rewards: torch.Tensor
    """Implicit rewards of chosen (desirable) answers, detached: [N], or as many as there are."""
    rejected_rewards: torch.Tensor
    """The same of the rejected (undesirable) ones."""
    correct: torch.Tensor
    """[N] bool: the implicit reward says what the label says."""


class PreferenceRow(NamedTuple):
    """A row of PREFERENCE_LOSSES: a pure function `(inputs, config)`, its knobs, its inputs."""

    function: Callable[[Any, Any], PreferenceOutput]
    config: type[Any]
    reference: bool = True
    """Whether answers have ref_logprobs."""
    paired: bool = True
    """PairInputs; else LabelledInputs."""


def pair_output(
    loss: torch.Tensor, chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor
) -> PreferenceOutput:
    """The output of a loss on pairs; rewards are detached here."""
    chosen, rejected = chosen_rewards.detach(), rejected_rewards.detach()
    return PreferenceOutput(
        loss=loss, chosen_rewards=chosen, rejected_rewards=rejected, correct=chosen > rejected
    )
