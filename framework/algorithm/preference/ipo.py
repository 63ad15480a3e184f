"""Identity preference optimization: a margin to reach, not one to grow for ever."""

from dataclasses import dataclass

from framework.algorithm.preference.inputs import PairInputs, PreferenceOutput, pair_output


@dataclass(frozen=True, kw_only=True)
class Config:
    """Knobs of ipo."""

    beta: float = 0.1
    """The paper's tau."""
    per_token: bool = True
    """Log-ratios are means over an answer's tokens; else sums."""


def loss(inputs: PairInputs, config: Config) -> PreferenceOutput:
    """IPO (arXiv 2310.12036, eq. 17): L = (D - 1 / (2 beta))^2, D as in dpo. Implicit reward:
    beta times the log-ratio.

    Deviation: the paper writes log pi of an answer; per_token=true takes the mean over its tokens,
    as TRL does, so that the margin asked for does not depend on lengths.
    """
    chosen, rejected = inputs.chosen.log_ratios, inputs.rejected.log_ratios
    if config.per_token:
        chosen = chosen / inputs.chosen.num_tokens
        rejected = rejected / inputs.rejected.num_tokens
    value = (chosen - rejected - 1 / (2 * config.beta)) ** 2
    return pair_output(value, config.beta * chosen, config.beta * rejected)
