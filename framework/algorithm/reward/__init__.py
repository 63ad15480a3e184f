"""Losses of reward models: of pairs of scores, unreduced, pure; the mean over pairs is trained.

loss(inputs: ScoredPairs, config: Config) -> PreferenceOutput
"""

from framework.algorithm.reward import bradley_terry
from framework.algorithm.rows import Row

REWARD_LOSSES: dict[str, Row] = {
    "bradley_terry": Row(bradley_terry.loss, bradley_terry.Config),
}
