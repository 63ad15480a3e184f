"""Preference losses: of whole answers, unreduced, pure. One file each: its `Config` and its `loss`.

    loss(inputs: PairInputs, config: Config) -> PreferenceOutput

(LabelledInputs where the row says paired=False.) The reduction is the mean over the pairs of the
global batch. Adding one is one file, one row here and one yaml.
"""

from framework.algorithm.preference import cdpo, dpo, ipo, kto, orpo, rpo, simpo
from framework.algorithm.preference.inputs import PreferenceRow

PREFERENCE_LOSSES: dict[str, PreferenceRow] = {
    "dpo": PreferenceRow(dpo.loss, dpo.Config),
    "cdpo": PreferenceRow(cdpo.loss, cdpo.Config),
    "ipo": PreferenceRow(ipo.loss, ipo.Config),
    "rpo": PreferenceRow(rpo.loss, rpo.Config),
    "simpo": PreferenceRow(simpo.loss, simpo.Config, reference=False),
    "orpo": PreferenceRow(orpo.loss, orpo.Config, reference=False),
    "kto": PreferenceRow(kto.loss, kto.Config, paired=False),
}
