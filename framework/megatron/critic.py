"""The critic: a second model with a scalar head, in the policy's mesh and layout.

    old values -> advantages and returns (credit.py) -> policy update, critic update

The estimate at position t is of the state in which token t + 1 is chosen, so it is aligned as
log-probs are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from framework.algorithm.critic.value_loss import value_loss
from framework.config_critic import CriticConfig
from framework.megatron.figures import sum_figures
from framework.megatron.microbatch import Microbatch
from framework.megatron.model import Policy
from framework.megatron.parallel import Mesh
from framework.megatron.step import StepRunner, no_tokens


@dataclass
class Critic:
    """Estimates and updates."""

    model: Policy
    mesh: Mesh
    config: CriticConfig

    def __post_init__(self) -> None:
        # Neither a temperature nor chunks of logits: its output is one number a position.
        self._runner = StepRunner(self.model, self.mesh, 1.0, 1)

    def value(self, updates: Sequence[Sequence[Microbatch]]) -> None:
        """Fill values of every micro-batch of a step (last stage only)."""
        for microbatches in updates:
            self._values(list(microbatches))

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
