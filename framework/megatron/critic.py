"""The critic: a second model with a scalar head, in the policy's mesh and layout.

    old values -> advantages and returns of whole samples -> policy update, critic update

The estimate at position t is of the state in which token t + 1 is chosen, so it is aligned as
log-probs are. Every rank handles its own samples; sums for whitening are all that ranks exchange.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from framework.algorithm.critic.inputs import TokenRows, ValuedTokens
from framework.algorithm.critic.value_loss import value_loss
from framework.config_critic import CriticConfig
from framework.megatron.microbatch import Microbatch
from framework.megatron.model import Policy
from framework.megatron.packing import zigzag_positions
from framework.megatron.parallel import Mesh
from framework.megatron.step import StepRunner, no_tokens, sum_figures

_STD_EPS = 1e-8


@dataclass
class Critic:
    """Estimates, advantages by them, and updates."""

    model: Policy
    mesh: Mesh
    config: CriticConfig
    estimate: Callable[[ValuedTokens], torch.Tensor]
    """A row of VALUE_ADVANTAGES with its knobs."""

    def __post_init__(self) -> None:
        # Neither a temperature nor chunks of logits: its output is one number a position.
        self._runner = StepRunner(self.model, self.mesh, 1.0, 1)

    def prepare(
        self, updates: Sequence[Sequence[Microbatch]], rewards: Sequence[float]
    ) -> dict[str, float]:
        """Fill values, returns and advantages of every micro-batch of a step (last stage only).

        Args:
            rewards: of each sample of the step's batch.

        Returns:
            Figures of the whole step, the same on every rank.
        """
        for microbatches in updates:
            self._values(list(microbatches))
        mine = [each for microbatches in updates for each in microbatches]
        if self.mesh.is_last_stage:
            for batch in mine:
                self._credit(batch, [rewards[i] for i in batch.samples])
        return self._whiten(mine)

    def update(self, microbatches: list[Microbatch], update: int) -> dict[str, float]:
        """One optimizer step down the value loss, weighted as the policy's loss is."""

        def evaluate(batch: Microbatch, output: torch.Tensor) -> Any:
            values = output[0]
            assert batch.values is not None
            assert batch.returns is not None
            clip = self.config.value_clip
            loss, clipped = value_loss(values, batch.values, batch.returns, clip)
            total = (loss * batch.weights).sum()
            mask = batch.loss_mask
            figures = {"loss": total, "tokens": mask.sum(), "clipped": (clipped * mask).sum()}
            return total, no_tokens(), {name: each.detach() for name, each in figures.items()}

        lr = self.config.lr * min(1.0, (update + 1) / max(1, self.config.warmup_steps))
        reports, grad_norm = self._runner.optimize(microbatches, evaluate, lr)
        totals = sum_figures(reports, self.mesh)
        return {
            "train/value_loss": totals["loss"],
            "train/value_clip_fraction": totals["clipped"] / max(1.0, totals["tokens"]),
            "train/critic_grad_norm": grad_norm,
        }

    def _values(self, microbatches: list[Microbatch]) -> None:
        def keep(batch: Microbatch, output: torch.Tensor) -> Any:
            return output.sum() * 0, no_tokens(), {"values": output[0].detach()}

        outputs = self._runner.measure(microbatches, keep)
        for batch, output in zip(microbatches, outputs, strict=self.mesh.is_last_stage):
            batch.values = output["values"]

    def _credit(self, batch: Microbatch, rewards: Sequence[float]) -> None:
        """Advantages and returns of whole samples, of which context parallelism holds parts."""
        assert batch.values is not None
        starts = batch.packed_seq_params.cu_seqlens_q
        assert starts is not None
        cp = self.mesh.layout.cp
        here = zigzag_positions(starts.tolist(), cp, self.mesh.coords.cp)
        places = torch.tensor(here, device=batch.values.device)
        columns = torch.stack([batch.values, batch.loss_mask, batch.turn_ends])
        whole = columns.new_zeros((3, int(starts[-1])))
        whole[:, places] = columns
        values, mask, turn_ends = self.mesh.sum_over_cp(whole)
        count = batch.num_sequences
        ids = torch.arange(count, device=mask.device).repeat_interleave(starts.diff())
        tokens = TokenRows(mask, ids, count)
        earned = torch.zeros(count, dtype=torch.float64, device=mask.device)
        earned[: len(rewards)] = torch.tensor(rewards, dtype=torch.float64)
        rows = ValuedTokens(
            values=tokens.rows(values),
            rewards=tokens.last(earned),
            mask=tokens.rows(mask),
            turn_ends=tokens.rows(turn_ends),
        )
        advantages = self.estimate(rows)
        batch.advantages = tokens.packed(advantages)[places].float()
        batch.returns = tokens.packed(advantages + rows.values)[places].float()

    def _whiten(self, mine: Sequence[Microbatch]) -> dict[str, float]:
        """Advantages to mean 0 and deviation 1 over the policy's tokens of the step."""
        sums = torch.zeros(7, dtype=torch.float64)
        if self.mesh.reports:
            sums = sum((_moments(each) for each in mine), sums)
        dist.all_reduce(sums)
        moments = (sums / sums[0].clamp(min=1)).tolist()
        _, mean, square, returns, returns_square, error, error_square = moments
        deviation = max(0.0, square - mean**2) ** 0.5
        if self.mesh.is_last_stage and self.config.whiten:
            for batch in mine:
                white = (batch.advantages - mean) / (deviation + _STD_EPS)
                batch.advantages = white * batch.loss_mask
        spread = returns_square - returns**2
        return {
            "train/advantage_std": deviation,
            "train/return_mean": returns,
            "train/value_mean": returns - error,
            # Returns that are all alike leave nothing to explain.
            "train/value_explained_variance": (
                1 - (error_square - error**2) / spread if spread > 1e-12 else 0.0
            ),
        }


def _moments(batch: Microbatch) -> torch.Tensor:
    """[7] float64 on the host: tokens; sums of A, A^2, R, R^2, R - V and (R - V)^2."""
    assert batch.values is not None
    assert batch.returns is not None
    mask = batch.loss_mask.double()
    returns = batch.returns.double()
    parts = [mask.sum()]
    for each in (batch.advantages.double(), returns, returns - batch.values.double()):
        parts += [(each * mask).sum(), (each**2 * mask).sum()]
    return torch.stack(parts).cpu()
