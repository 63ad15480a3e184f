"""What stage=preference trains by: the configured loss on the answers of a micro-batch. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from framework.algorithm.preference import PREFERENCE_LOSSES
from framework.algorithm.preference.inputs import (
    Answers,
    LabelledInputs,
    PairInputs,
    PreferenceOutput,
    PreferenceRow,
)
from framework.algorithm.rows import Row
from framework.algorithm_rows import find_row
from framework.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class PreferenceObjective:
    """A loss bound to its knobs."""

    loss: Callable[[Any], PreferenceOutput]
    reference: bool
    """Whether answers need ref_logprobs."""
    paired: bool
    """Answers come in pairs, the chosen one first; else one by one, each with a label."""

    def __call__(
        self, answers: Answers, desirable: Sequence[bool], kl: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Sum of the losses of a micro-batch's N answers, and sums of what is logged, [] float64.

        Args:
            desirable: [N]; pairs are True, False, True, False...
            kl: see LabelledInputs; not used for pairs.
        """
        good = torch.tensor(desirable, dtype=torch.bool, device=answers.logprobs.device)
        if self.paired:
            inputs: Any = PairInputs(chosen=_some(answers, good), rejected=_some(answers, ~good))
        else:
            inputs = LabelledInputs(answers=answers, desirable=good, kl=kl)
        output = self.loss(inputs)
        with torch.no_grad():
            figures = {
                "loss": output.loss.detach().sum(),
                "units": torch.ones_like(output.loss).sum(),
                "correct": output.correct.double().sum(),
                "chosen": good.double().sum(),
                "rejected": (~good).double().sum(),
                "chosen_reward": output.chosen_rewards.sum(),
                "rejected_reward": output.rejected_rewards.sum(),
                "chosen_logprobs": answers.logprobs.detach()[good].sum(),
                "rejected_logprobs": answers.logprobs.detach()[~good].sum(),
                "tokens": answers.num_tokens.sum(),
            }
        return output.loss.sum(), figures


def _some(answers: Answers, which: torch.Tensor) -> Answers:
    ref = answers.ref_logprobs
    return replace(
        answers,
        logprobs=answers.logprobs[which],
        num_tokens=answers.num_tokens[which],
        ref_logprobs=None if ref is None else ref[which],
    )


def describe_figures(totals: dict[str, float]) -> dict[str, float]:
    """Means of the summed figures, by their names in metrics.jsonl without the prefix."""
    units = max(1.0, totals["units"])
    means = {"loss": totals["loss"] / units, "accuracy": totals["correct"] / units}
    for name in ("chosen", "rejected"):
        for what in ("reward", "logprobs"):
            if f"{name}_{what}" in totals:
                means[f"{name}_{what}"] = totals[f"{name}_{what}"] / max(1.0, totals[name])
    means["reward_margin"] = means["chosen_reward"] - means["rejected_reward"]
    return means


def find_preference_row(name: str) -> PreferenceRow:
    """A row of PREFERENCE_LOSSES, or a module of the user's: on pairs, with a reference.

    Raises:
        ValueError: there is none such.
    """
    if name in PREFERENCE_LOSSES:
        return PREFERENCE_LOSSES[name]
    own = find_row({}, name, "loss")
    return PreferenceRow(own.function, own.config)


def build_preference_objective(config: RunConfig) -> PreferenceObjective:
    """The objective of a run of stage=preference."""
    row = find_preference_row(config.algorithm.loss)
    return PreferenceObjective(
        loss=Row(row.function, row.config).bind(config.algorithm.loss_args),
        reference=row.reference,
        paired=row.paired,
    )
