"""stage=reward_model on one rank: the loop of stage=preference, scores in place of log-probs."""

from typing import Any

import torch

from framework.algorithm.inputs import Sequences
from framework.algorithm.reward import REWARD_LOSSES
from framework.algorithm.reward.inputs import ScoredPairs
from framework.algorithm_rows import find_row
from framework.megatron.microbatch import Microbatch
from framework.megatron.step import Evaluate, no_tokens
from framework.preference_trainer import Packed, PreferenceTrainer


class RewardTrainer(PreferenceTrainer):
    """Trains a scalar head and the model under it; needs pairs and no reference."""

    def __post_init__(self) -> None:
        algorithm = self.config.algorithm
        row = find_row(REWARD_LOSSES, algorithm.loss, "loss")
        self.loss = row.bind(algorithm.loss_args)
        self.paired, self.needs_reference = True, False
        self.prepare(temperature=1.0)
        self._held_out: Packed | None = None

    def evaluation(self, packed: Packed) -> Evaluate:
        """The loss of a micro-batch as the step runner wants it."""

        def evaluate(batch: Microbatch, output: torch.Tensor) -> Any:
            scores = self.scores(batch, output[0])
            margins = [packed.margins[i] for i in batch.samples[::2]]
            result = self.loss(
                ScoredPairs(
                    chosen=scores[::2],
                    rejected=scores[1::2],
                    margins=torch.tensor(margins, dtype=scores.dtype, device=scores.device),
                )
            )
            units = torch.ones_like(result.loss).sum()
            figures = {
                "loss": result.loss.detach().sum(),
                **dict.fromkeys(("units", "chosen", "rejected"), units),
                "correct": result.correct.double().sum(),
                "chosen_reward": result.chosen_rewards.sum(),
                "rejected_reward": result.rejected_rewards.sum(),
                "tokens": (batch.loss_mask.sum() * self.mesh.layout.cp).double(),
            }
            # Every context-parallel rank computed them, and all of these are added up.
            share = {name: value / self.mesh.layout.cp for name, value in figures.items()}
            total = (result.loss.sum() / packed.num_units).float()
            return total, no_tokens(), share

        return evaluate

    def scores(self, batch: Microbatch, scores: torch.Tensor) -> torch.Tensor:
        """[samples] float64: the score at each sample's last token, in the micro-batch's order."""
        ends = Sequences(
            ids=batch.sequence_ids,
            count=batch.num_sequences,
            mask=batch.is_last,
            add_up=self.mesh.sum_over_cp,
        )
        return ends.totals(scores)[: len(batch.samples)]
