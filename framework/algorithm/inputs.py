"""What advantages, losses and corrections are given and return: plain tensors, torch alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, kw_only=True)
class Turns:
    """The policy's turns in one sample, in order."""

    starts: list[int]
    """Response positions at which they begin."""
    states: list[str]
    """What the policy faced; equal in a group: the same."""
    rewards: list[float]
    """The part of the reward that the environment paid for each."""


@dataclass(frozen=True, kw_only=True)
class AdvantageInputs:
    """One step's samples, N of them, of any number per group; the same on every rank."""

    rewards: torch.Tensor
    """[N] float."""
    group_ids: torch.Tensor
    """[N] int64; samples of one prompt share an id, in any order and number."""
    response_lengths: list[int]
    """[N]; the length of each advantage returned."""
    num_loss_tokens: list[int]
    """[N]; how many of them the policy wrote, at least 1."""
    components: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """[N] float each: parts of the rewards by name; NaN where a sample's reward did not tell it."""
    baselines: torch.Tensor | None = None
    """[N] float: reward of the greedy answer to the same prompt (rollout.greedy_baseline)."""
    turns: list[Turns] | None = None
    """[N]; None where a sample does not tell them."""


def _alone(values: torch.Tensor) -> torch.Tensor:
    return values


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Which positions of a micro-batch belong to one sequence, for what is defined on whole ones.

    Under context parallelism a rank holds a part of each sequence: every method adds the parts up,
    so all ranks of the context-parallel group call the same methods in the same order.
    """

    ids: torch.Tensor
    """[T] int64 in [0, count)."""
    count: int
    """Sequences in the micro-batch, padding included."""
    mask: torch.Tensor
    """[T] float32: 1 where the policy wrote the token."""
    add_up: Callable[[torch.Tensor], torch.Tensor] = _alone
    """Sum over the context-parallel ranks."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """[T]: at every position the sum over the policy's tokens of its sequence; detached."""
        return self._sums(values * self.mask)[self.ids].to(values.dtype)

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """[T]: the mean over the policy's tokens of its sequence (0 where there are none)."""
        sums, counts = self._sums(torch.stack([values * self.mask, self.mask]))
        return (sums / counts.clamp(min=1))[self.ids].to(values.dtype)

    def totals(self, values: torch.Tensor) -> torch.Tensor:
        """[count] float64: each sequence's sum over the policy's tokens, whole on every rank; the
        gradient goes to this rank's own tokens.
        """
        mine = self._parts((values * self.mask).double())
        others = self.add_up(mine.detach().clone()) - mine.detach()
        return mine + others

    def _sums(self, values: torch.Tensor) -> torch.Tensor:
        # In double precision, so that the sum hardly depends on how the sequence is cut.
        return self.add_up(self._parts(values.detach().double()))

    def _parts(self, values: torch.Tensor) -> torch.Tensor:
        empty = values.new_zeros((*values.shape[:-1], self.count))
        return empty.index_add(-1, self.ids, values)


@dataclass(frozen=True, kw_only=True)
class TeacherTop:
    """A teacher's k likeliest tokens at each position: what it and the policy say of them."""

    teacher_logprobs: torch.Tensor
    """[k, T] float32."""
    policy_logprobs: torch.Tensor
    """[k, T] float32, of the same tokens; carries the gradient."""
    policy_rest: torch.Tensor
    """[T] float32: the probability that the policy gives to all other tokens; carries the gradient.
    """


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """The tokens of one micro-batch; [T] float32 each, aligned to the token that is scored."""

    policy_logprobs: torch.Tensor
    """Carries the gradient."""
    old_logprobs: torch.Tensor
    """The policy's before this step's first update, computed by the trainer."""
    rollout_logprobs: torch.Tensor
    """The engine's, of the policy that sampled the token (at its version)."""
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    """1 where the policy wrote the token; everything else is ignored by the caller."""
    entropy: torch.Tensor
    """Of the policy's distribution, in nats; carries the gradient."""
    sequences: Sequences
    ref_logprobs: torch.Tensor | None = None
    """The reference policy's, where algorithm.kl_coef asks for one."""
    staleness: torch.Tensor | None = None
    """[T] float32: how many versions the policy was ahead of the token's at the step's beginning; 0
    where loss_mask is 0."""
    selected: torch.Tensor | None = None
    """[T] float32: 1 at the tokens that the loss's own `scores` chose among the whole update's."""
    teacher: TeacherTop | None = None
    """Where rollout.teacher_top_k asks for it."""


@dataclass(frozen=True, kw_only=True)
class SelectionInputs:
    """Tokens among which a loss selects some, before the update; [T] float32 each, of this rank.

    The means are over the policy's tokens of the whole update, on whatever rank they are.
    """

    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    uniform: torch.Tensor
    """In [0, 1): a random number that belongs to the token, whichever rank holds it."""
    old_logprob_mean: float
    advantage_mean: float

    def covariance(self) -> torch.Tensor:
        """[T]: (log pi - mean log pi) (A - mean A), a token's part of their covariance."""
        centered = self.old_logprobs.double() - self.old_logprob_mean
        return (centered * (self.advantages.double() - self.advantage_mean)).float()


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """What a loss returns."""

    loss: torch.Tensor
    """[T] per token, unreduced."""
    metrics: dict[str, torch.Tensor]
    """[T] each, detached; logged as means over the policy's tokens."""


@dataclass(frozen=True, kw_only=True)
class CorrectionOutput:
    """What a correction returns."""

    weights: torch.Tensor
    """[T] detached: the factor of each token's loss; the denominators stay as they are."""
    metrics: dict[str, torch.Tensor]
    """[T] each, detached; logged as means over the policy's tokens."""
