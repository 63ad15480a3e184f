"""The table of models and layouts whose logits must be transformers'."""

from dataclasses import dataclass, field
from typing import Any

from bridge_models import MODELS

TOLERANCE = 2e-6
"""Largest |difference of logits| over largest |logit|, fp32."""
WRONG_DIFFERENCE = 0.1
"""A planted wrong rule is off by at least this."""
MERGED_TOLERANCE = 1e-6
"""Largest |difference| of an exported weight from W + alpha / r B A in float64."""


@dataclass(frozen=True)
class Case:
    """One row: a model and its layout."""

    model: str
    layout: dict[str, int] = field(default_factory=dict)
    """Fields of `Layout` other than their defaults."""
    ci: bool = False
    """Run for every change; the others at night."""
    wrong: str = ""
    """A rule to plant: a bijection that round-trips, and is wrong."""
    dst: int = 0
    """The rank that the weights are exported to."""
    save: bool = False
    """Also write a directory, and make a second writer fail."""
    adapter: bool = False
    """Also with adapters that PEFT wrote: its logits, its files back, its merged weights."""
    mtp: bool = True
    """Build multi-token prediction layers, where the model has some; else they are carried."""
    convert: bool = False
    """Also load what `drivetrain-convert` wrote, save a checkpoint and convert that."""

    @property
    def name(self) -> str:
        """`qwen3_tied tp2 pp2`; one rank: `qwen3_tied tp1`."""
        sizes = [f"{key.removesuffix('_stage_layers')}{n}" for key, n in self.layout.items()]
        return " ".join(
            [
                self.model,
                *(sizes or ["tp1"]),
                *(["wrong", self.wrong] if self.wrong else []),
                *([] if self.mtp else ["carried"]),
            ]
        )

    @property
    def architecture(self) -> str:
        """The name in config.json."""
        return f"{MODELS[self.model][0]}ForCausalLM"

    @property
    def world_size(self) -> int:
        """Processes."""
        size = 1
        for key in ("tp", "pp", "cp", "dp"):
            size *= self.layout.get(key, 1)
        return size


DENSE_LAYOUTS: list[dict[str, int]] = [
    {},
    {"tp": 2},
    {"tp": 2, "pp": 2},
    {"tp": 4},  # above the KV heads
    {"pp": 2, "vpp": 2},
    {"pp": 2, "first_stage_layers": 1},
]
MOE_LAYOUTS: list[dict[str, int]] = [
    *DENSE_LAYOUTS,
    {"dp": 2, "ep": 2},
    {"tp": 2, "etp": 2},
    {"tp": 2, "dp": 2, "ep": 4},
    {"tp": 2, "dp": 2, "ep": 2, "etp": 2},
    {"tp": 2, "pp": 2, "ep": 2},
]

CI = {
    "qwen3_tied tp2 pp2",
    "qwen3_tied pp2 vpp2",
    "qwen3_untied tp4",
    "llama_tied tp4",
    "llama3 tp1",
    "llama3 tp2 pp2",
    "mistral tp2 pp2",
    "qwen2_tied tp4",
    "qwen2_untied tp2 pp2",
    "mixtral tp2 pp2 ep2",
    "glm4_moe tp2 pp2 ep2",
    "glm4_moe_air pp2 vpp2",
    "deepseek_v3 tp2 pp2 ep2",
    "deepseek_v3_rope tp2 etp2",
    "deepseek_v3_mtp tp2",
    "glm4_moe_mtp tp2 pp2 ep2",
    "qwen2_moe tp2 pp2 ep2",
    "qwen2_moe tp2 etp2",
    "qwen3_moe tp2 etp2",
    "qwen3_moe tp2 dp2 ep2 etp2",
    "qwen3_moe_mixed pp2 first1",
    "qwen3_moe_mixed tp2 pp2 ep2",
}
"""For every architecture the layout that cuts it in most ways, and each kind of cut somewhere."""

DST = {"qwen3_tied tp4": 3, "llama3 tp2 pp2": 2, "qwen3_moe tp2 etp2": 1}
SAVE = {"qwen3_tied tp2 pp2"}
ADAPTED = "qwen3_untied"
"""The model of record_peft.py."""
CONVERT = {
    "qwen3_tied tp2 pp2",
    "llama_tied tp4",
    "glm4_moe_air pp2 vpp2",
    "qwen3_moe_mixed tp2 pp2 ep2",
    "deepseek_v3 tp2 pp2 ep2",
    "glm4_moe_mtp tp2 pp2 ep2",
}
"""For every change; at night every row is converted."""


def _cases() -> list[Case]:
    cases = []
    for model in MODELS:
        for layout in MOE_LAYOUTS if "num_experts_per_tok" in MODELS[model][1] else DENSE_LAYOUTS:
            name = Case(model, layout).name
            ci = name in CI
            cases.append(
                Case(
                    model,
                    layout,
                    ci,
                    dst=DST.get(name, 0),
                    save=name in SAVE,
                    adapter=model == ADAPTED,
                    convert=not ci or name in CONVERT,
                )
            )
    return cases


CASES = [
    *_cases(),
    Case("qwen3_tied", {"tp": 2}, ci=True, wrong="qkv"),
    Case("qwen3_tied", {"tp": 2}, ci=True, wrong="gated"),
    Case("qwen3_moe", {"tp": 2, "etp": 2}, ci=True, wrong="expert_gated"),
    Case("deepseek_v3_mtp", {"tp": 2}, ci=True, wrong="eh_proj"),
    Case("deepseek_v3_mtp", {"tp": 2}, ci=True, mtp=False, convert=True),
    Case("glm4_moe_mtp", {"pp": 2, "vpp": 2}, mtp=False, convert=True),
]
assert {case.name for case in CASES} >= CI | SAVE | CONVERT | DST.keys()


def adapter_errors(ranks: list[dict[str, Any]]) -> list[str]:
    """What is wrong with adapters that PEFT wrote, by what each rank saw: its logits, the base bit
    for bit once they are put aside, its files, and weights that hold them.
    """
    last = [rank for rank in ranks if "adapter_difference" in rank]  # ranks of the last stage
    errors = []
    if not last:
        errors.append("no rank has logits with adapters")
    if not all(rank["adapter_difference"] <= TOLERANCE for rank in last):
        errors.append("logits are not PEFT's")
    if not all(rank["base_difference"] > WRONG_DIFFERENCE for rank in last):
        errors.append("adapters do not matter")
    if not all(rank["base_back"] for rank in last):
        errors.append("the base does not come back without its adapters")
    if not (ranks and ranks[0].get("adapter_back")):
        errors.append("PEFT's files do not come back")
    if not (ranks and ranks[0].get("merged_difference", 1.0) <= MERGED_TOLERANCE):
        errors.append("merged weights are not W + alpha / r B A")
    return errors
