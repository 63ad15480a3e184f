"""Tokens that a policy too long ago sampled teach nothing."""

from dataclasses import dataclass

from framework.algorithm.inputs import CorrectionOutput, LossInputs


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of fresh."""

    max_versions: int = 1
    """How many versions a token may be behind."""


def weights(inputs: LossInputs, config: Config) -> CorrectionOutput:
    """1 where the token is at most max_versions behind, else 0. Tokens of one answer differ in that
    where it was interrupted by new weights (rollout.max_staleness_steps > 0).
    """
    assert inputs.staleness is not None
    masked = (inputs.staleness > config.max_versions).float()
    return CorrectionOutput(weights=1 - masked, metrics={"correction_masked_fraction": masked})
