"""No correction; what the trainer and the engine disagree by is measured all the same."""

from dataclasses import dataclass

import torch

from framework.algorithm.inputs import CorrectionOutput, LossInputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """none has no knobs."""


def weights(inputs: LossInputs, config: Config) -> CorrectionOutput:
    """1 for every token."""
    return CorrectionOutput(weights=torch.ones_like(inputs.old_logprobs), metrics={})
