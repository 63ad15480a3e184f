"""From the rewards of samples to advantages of tokens, where those depend on more than metadata.

    rewards [- coefficient x (old - ref log-probs)], a critic's values -> advantages, returns

What the environment paid for a turn is earned by that turn's last token, what a sample's reward
holds beyond it (all of it, where nobody tells turns) by the last token of the policy.

Every rank handles its own samples; sums over the step are all that ranks exchange.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from framework.algorithm.critic.inputs import TokenRows, ValuedTokens
from framework.algorithm.kl_control import next_coefficient
from framework.algorithm.running_std import RunningStd
from framework.megatron.microbatch import Microbatch
from framework.megatron.packing import zigzag_positions
from framework.megatron.parallel import Mesh
from rollout.types import SampleInfo

_STD_EPS = 1e-8
_COEFFICIENT = "kl_reward_coef"
_SCALE = "reward_"
_NORM = "return_"


@dataclass(kw_only=True)
class RewardKl:
    """The penalty of algorithm.kl_reward_*; `coefficient` moves where there is a target."""

    coefficient: float
    target: float
    horizon: float


@dataclass
class TokenCredit:
    """Gives tokens their advantages, after the passes whose log-probs and values it needs."""

    mesh: Mesh
    estimate: Callable[[ValuedTokens], torch.Tensor]
    """A row of VALUE_ADVANTAGES or RETURN_ADVANTAGES with its knobs."""
    whiten: bool
    """Advantages of the step's tokens to mean 0 and deviation 1."""
    valued: bool = False
    """Whether a critic fills the micro-batches' values."""
    kl: RewardKl | None = None
    scale: RunningStd | None = None
    """Rewards are divided by the spread of all so far."""
    norm: RunningStd | None = None
    """Of all tokens' returns so far, which the critic estimates brought to mean 0 and deviation 1
    (arXiv 1602.07714; deviation: its head is not rescaled when these move)."""

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        found = (
            {_COEFFICIENT: self.kl.coefficient}
            if self.kl is not None and self.kl.target > 0
            else {}
        )
        for prefix, each in ((_SCALE, self.scale), (_NORM, self.norm)):
            found |= {} if each is None else each.state(prefix)
        return found

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint's `state`."""
        if self.kl is not None and self.kl.target > 0:  # else it is what the configuration says
            self.kl.coefficient = state.get(_COEFFICIENT, self.kl.coefficient)
        for prefix, each in ((_SCALE, self.scale), (_NORM, self.norm)):
            if each is not None:
                each.restore(prefix, state)

    def assign(
        self, updates: Sequence[Sequence[Microbatch]], samples: Sequence[SampleInfo]
    ) -> dict[str, float]:
        """Fill advantages and returns of every micro-batch of a step (last stage only).

        Args:
            samples: of the step's batch.

        Returns:
            Figures of the whole step, the same on every rank.
        """
        mine = [each for microbatches in updates for each in microbatches]
        answers = [info.reward for info in samples if info.num_loss_tokens]
        divisor = 1.0
        if self.scale is not None:
            self.scale.add(answers)
            divisor = self.scale.std
        if self.mesh.is_last_stage:
            for batch in mine:
                self._credit(batch, [samples[i].reward for i in batch.samples], divisor)
        figures = self._finish(mine, max(1, len(answers)))
        return figures if self.scale is None else figures | {"train/reward_scale": divisor}

    def _credit(self, batch: Microbatch, rewards: Sequence[float], divisor: float) -> None:
        """Advantages and returns of whole samples, of which context parallelism holds parts."""
        starts = batch.packed_seq_params.cu_seqlens_q
        assert starts is not None
        cp = self.mesh.layout.cp
        here = zigzag_positions(starts.tolist(), cp, self.mesh.coords.cp)
        places = torch.tensor(here, device=batch.loss_mask.device)
        zeros = torch.zeros_like(batch.loss_mask)
        estimates = zeros if batch.values is None else batch.values
        if self.norm is not None:
            estimates = estimates * self.norm.std + self.norm.mean
        penalties = zeros if self.kl is None else self.kl.coefficient * _divergence(batch)
        columns = torch.stack(
            [estimates, batch.loss_mask, batch.turn_ends, batch.turn_rewards, penalties]
        )
        whole = columns.new_zeros((len(columns), int(starts[-1])))
        whole[:, places] = columns
        values, mask, turn_ends, paid, penalties = self.mesh.sum_over_cp(whole)
        count = batch.num_sequences
        ids = torch.arange(count, device=mask.device).repeat_interleave(starts.diff())
        tokens = TokenRows(mask, ids, count)
        earned = torch.zeros(count, dtype=torch.float64, device=mask.device)
        earned[: len(rewards)] = torch.tensor(rewards, dtype=torch.float64)
        turn_rewards = tokens.rows(paid)
        rest = tokens.last(earned - turn_rewards.sum(1))
        rows = ValuedTokens(
            values=tokens.rows(values),
            rewards=(turn_rewards + rest) / divisor - tokens.rows(penalties),
            mask=tokens.rows(mask),
            turn_ends=tokens.rows(turn_ends),
        )
        advantages = self.estimate(rows)
        batch.advantages = tokens.packed(advantages)[places].float()
        batch.returns = tokens.packed(advantages + rows.values)[places].float()

    def _finish(self, mine: Sequence[Microbatch], answers: int) -> dict[str, float]:
        """Whiten, adapt the coefficient, and tell."""
        sums = torch.zeros(6, dtype=torch.float64)
        if self.mesh.reports:
            sums = sum((_moments(each) for each in mine), sums)
        dist.all_reduce(sums)
        divergence = sums[-1].item() / answers
        moments = (sums / sums[0].clamp(min=1)).tolist()
        _, mean, square, returns, returns_square, _ = moments
        deviation = max(0.0, square - mean**2) ** 0.5
        spread = max(0.0, returns_square - returns**2)
        if self.mesh.is_last_stage and self.whiten:
            for batch in mine:
                white = (batch.advantages - mean) / (deviation + _STD_EPS)
                batch.advantages = white * batch.loss_mask
        figures = {"train/advantage_std": deviation, "train/return_mean": returns}
        if self.norm is not None:
            self.norm.add_moments(sums[0].item(), returns, spread * sums[0].item())
            figures["train/return_scale"] = self.norm.std
            for batch in mine if self.mesh.is_last_stage else ():
                assert batch.returns is not None
                normal = (batch.returns - self.norm.mean) / self.norm.std
                batch.returns = normal * batch.loss_mask
        if self.kl is not None:
            figures["train/kl_reward_coef"] = self.kl.coefficient
            figures["train/kl_of_answer"] = divergence
            self.kl.coefficient = next_coefficient(
                self.kl.coefficient,
                divergence,
                target=self.kl.target,
                horizon=self.kl.horizon,
                num_samples=answers,
            )
        if self.valued:
            figures["train/value_mean"] = returns - mean  # an advantage is a return less a value
            # Returns that are all alike leave nothing to explain.
            explained = 1 - deviation**2 / spread if spread > 1e-12 else 0.0
            figures["train/value_explained_variance"] = explained
        return figures


def _divergence(batch: Microbatch) -> torch.Tensor:
    """[T]: k1, log pi_old - log pi_ref, at the policy's tokens."""
    assert batch.old_logprobs is not None
    assert batch.ref_logprobs is not None
    return (batch.old_logprobs - batch.ref_logprobs) * batch.loss_mask


def _moments(batch: Microbatch) -> torch.Tensor:
    """[6] float64 on the host: tokens; sums of A, A^2, R, R^2 and of k1."""
    assert batch.returns is not None
    mask = batch.loss_mask.double()
    parts = [mask.sum()]
    for each in (batch.advantages.double(), batch.returns.double()):
        parts += [(each * mask).sum(), (each**2 * mask).sum()]
    there = batch.ref_logprobs is not None and batch.old_logprobs is not None
    parts.append(_divergence(batch).double().sum() if there else parts[0] * 0)
    return torch.stack(parts).cpu()
