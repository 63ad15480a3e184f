"""What flows from the engines to the trainers: samples, groups, batches.

Tokens are the source of truth; text is derived from them. Arrays that every rank needs are small
(`StepBatch`); arrays that only their trainer needs travel apart (`Sample`, fetched by index).
"""

from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from rollout.routes import ROUTE_DTYPES


class Status(StrEnum):
    """How a sample ended."""

    STOPPED = "stopped"
    """The policy ended its answer (end-of-sequence token, stop string or environment done)."""
    TRUNCATED = "truncated"
    """The token budget ran out first."""
    FAILED = "failed"
    """Environment, reward or engine failed; the loss mask is all zero."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """One trajectory: P prompt tokens, then R response tokens (of policy and environment)."""

    group_id: int
    index: int
    """Place in its group."""
    tokens: np.ndarray
    """[P + R] int32."""
    prompt_length: int
    """P"""
    loss_mask: np.ndarray
    """[R] uint8: 1 where the policy wrote the token."""
    rollout_logprobs: np.ndarray
    """[R] float32: the engine's log-prob at the sampling temperature; 0 where loss_mask is 0."""
    versions: np.ndarray
    """[R] int32: the policy version that sampled each token; -1 where loss_mask is 0."""
    turn_starts: np.ndarray
    """[turns] int32: response positions at which the policy's turns begin."""
    reward: float
    turn_states: list[str] = field(default_factory=list)
    """[turns]: what the policy faced before each of its turns; equal in a group: the same. Empty:
    nobody said."""
    turn_rewards: list[float] = field(default_factory=list)
    """[turns]: what the environment paid for each, as far as it is part of `reward`; as long as
    turn_states."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Components by name."""
    baseline_reward: float | None = None
    """Of the greedy answer to the same prompt (rollout.greedy_baseline)."""
    teacher_logprobs: np.ndarray | None = None
    """[R] float32: the teacher's log-prob of each token (rollout.teacher); 0 where loss_mask is."""
    teacher_top_ids: np.ndarray | None = None
    """[R, k] int32: the teacher's likeliest tokens in place of each (rollout.teacher_top_k)."""
    teacher_top_logprobs: np.ndarray | None = None
    """[R, k] float32: its log-probs of them."""
    routes: np.ndarray | None = None
    """[N, layers * k] of a type in ROUTE_DTYPES: the experts that the engine computed the first N
    tokens with (rollout.engine.return_routes), all but what follows the policy's last choice."""
    status: Status = Status.STOPPED
    metadata: dict[str, str] = field(default_factory=dict)
    """For people: the task's own description, the answer wanted."""
    domain: str = ""
    """Of data.mixture; "": there is none."""

    @property
    def response_length(self) -> int:
        """R"""
        return len(self.loss_mask)

    @property
    def task_reward(self) -> float:
        """The reward without the penalty for its length (rollout.rewards.overlong)."""
        return self.reward - self.rewards.get("overlong", 0.0)

    @property
    def right(self) -> bool:
        """What accuracies count: a task's reward of at least 1, but for rounding of its sum."""
        return self.task_reward > 1 - 1e-9

    def check(self) -> None:
        """Raise ValueError when the arrays do not fit each other."""
        where = f"sample {self.group_id}/{self.index}"
        expected = len(self.tokens) - self.prompt_length
        for name in ("loss_mask", "rollout_logprobs", "versions"):
            if len(getattr(self, name)) != expected:
                raise ValueError(
                    f"{where}: {name} has {len(getattr(self, name))} entries, its response "
                    f"{expected} tokens"
                )
        for name in ("turn_states", "turn_rewards"):
            found = len(getattr(self, name))
            if found != len(self.turn_starts) and (found or self.turn_states):
                raise ValueError(f"{where}: {found} {name} of {len(self.turn_starts)} turns")
        written = self.loss_mask.astype(bool)
        if not np.isfinite(self.rollout_logprobs).all() or (self.rollout_logprobs > 1e-6).any():
            raise ValueError(f"{where}: rollout_logprobs must be finite and <= 0")
        if (scored := self.teacher_logprobs) is not None and (
            len(scored) != expected or not np.isfinite(scored).all() or (scored > 1e-6).any()
        ):
            raise ValueError(f"{where}: teacher_logprobs must be {expected} finite numbers <= 0")
        self._check_top(where)
        if self.routes is not None:
            self._check_routes(where)
        if (self.versions[written] < 0).any():
            raise ValueError(f"{where}: a token written by the policy has no version")
        if not np.isfinite(self.reward):
            raise ValueError(f"{where}: reward is {self.reward}")
        if not np.isfinite(self.turn_rewards).all():
            raise ValueError(f"{where}: turn_rewards are {self.turn_rewards}")

    def _check_top(self, where: str) -> None:
        ids, logprobs = self.teacher_top_ids, self.teacher_top_logprobs
        if ids is None and logprobs is None:
            return
        if ids is None or logprobs is None or ids.shape != logprobs.shape or ids.ndim != 2:
            raise ValueError(f"{where}: teacher_top_ids and teacher_top_logprobs are [R, k] both")
        if len(ids) != len(self.loss_mask) or (ids < 0).any():
            raise ValueError(f"{where}: teacher_top_ids must be token ids in each token's place")
        if not np.isfinite(logprobs).all() or (logprobs > 1e-6).any():
            raise ValueError(f"{where}: teacher_top_logprobs must be finite and <= 0")

    def _check_routes(self, where: str) -> None:
        routes, chosen = self.routes, self.loss_mask.nonzero()[0]
        assert routes is not None
        if routes.ndim != 2 or routes.dtype.name not in ROUTE_DTYPES:
            raise ValueError(
                f"{where}: routes are {routes.dtype}{list(routes.shape)}, not ids [N, W]"
            )
        needed = self.prompt_length + int(chosen[-1]) if len(chosen) else 0
        if not needed <= len(routes) < len(self.tokens):
            raise ValueError(
                f"{where}: routes of {len(routes)} tokens; the policy chose with {needed} of "
                f"{len(self.tokens)}"
            )


@dataclass(kw_only=True, slots=True)
class Group:
    """All samples of one prompt."""

    group_id: int
    """Position of the prompt in the training stream: unique, increasing."""
    start_version: int
    """Policy version when its generation was admitted."""
    samples: list[Sample]


@dataclass(kw_only=True, slots=True)
class SampleInfo:
    """What every trainer rank must know of a sample to plan a step."""

    group_id: int
    index: int
    prompt_length: int
    response_length: int
    num_loss_tokens: int
    reward: float
    version: int
    """Oldest version among its tokens."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Components by name."""
    baseline_reward: float | None = None
    """Of the greedy answer to the same prompt."""
    turn_starts: list[int] = field(default_factory=list)
    """Of Sample, where its turn_states are known; the three are alike in length."""
    turn_states: list[str] = field(default_factory=list)
    turn_rewards: list[float] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class StepBatch:
    """The metadata of one training step, the same for every rank; no token arrays."""

    step: int
    """First step is 0: the batch that turns version 0 into version 1."""
    samples: list[SampleInfo]
    """Ordered by (group_id, index)."""
    staleness_max: int
    """step - oldest version among the samples."""
    metrics: dict[str, float] = field(default_factory=dict)
    """`rollout/...` figures of this batch."""


@dataclass(kw_only=True, slots=True)
class SetResult:
    """What one set of prompts of an evaluation gave."""

    accuracy: float
    """Fraction of its samples with a reward of at least 1: avg@k of samples_per_prompt = k."""
    reward_mean: float
    failed_fraction: float
    response_length_mean: float
    num_prompts: int
    samples_per_prompt: int
    pass_at: dict[str, float] = field(default_factory=dict)
    """k -> chance that one of k samples is right; k in powers of two and samples_per_prompt."""


@dataclass(kw_only=True, slots=True)
class EvalResult:
    """One evaluation on held-out prompts."""

    version: int
    """The policy version that was measured."""
    accuracy: float
    """Fraction of held-out prompts with a reward of at least 1, at data.eval_temperature."""
    reward_mean: float
    """Mean reward, partial credit included."""
    failed_fraction: float
    """Samples whose environment or reward failed; they count as wrong."""
    num_prompts: int
    response_length_mean: float
    time_s: float
    sets: dict[str, SetResult] = field(default_factory=dict)
    """By name: the domains of data.mixture, which the figures above are the mean of, and
    eval.sets."""
