"""The table of layouts that must train exactly as one rank does, and the models that they train."""

from dataclasses import dataclass, field
from typing import Any

from framework.config_lora import ATTENTION_TARGETS, LORA_TARGETS

LOSS_TOLERANCE = 1e-6
"""Largest relative difference of a step's loss from that of one rank."""
NOISY = ("reward_kl",)
"""Objectives whose losses, below 1, are compared absolutely: a reward holds the k1 of all tokens
that follow, small differences of log-probs (rounded by 6e-6), and the terms of the mean cancel."""
WEIGHT_TOLERANCE = 1e-5
"""Largest absolute difference of any weight after the last step."""

DENSE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 101,  # padded in every layout
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # heads * head_dim is not hidden_size
    "tie_word_embeddings": False,
}
MOE: dict[str, Any] = {
    **DENSE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
SIGMOID: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
}
GLM: dict[str, Any] = {
    **DENSE,
    **SIGMOID,
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "use_qk_norm": True,
}
DEEPSEEK: dict[str, Any] = {
    **DENSE,
    **SIGMOID,
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
}
LLAMA: dict[str, Any] = {**DENSE, "architectures": ["LlamaForCausalLM"]}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": DENSE,
    "qwen3_tied": {**DENSE, "tie_word_embeddings": True},
    "qwen3_deep": {**DENSE, "num_hidden_layers": 8},
    "llama": LLAMA,
    "llama_tied": {**LLAMA, "tie_word_embeddings": True},
    "glm": GLM,
    "deepseek": DEEPSEEK,
    "deepseek_mtp": {**DEEPSEEK, "num_nextn_predict_layers": 2},
    "moe": MOE,
    "moe_mixed": {**MOE, "tie_word_embeddings": True, "mlp_only_layers": [1]},
}

OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {},
    # What is defined on whole sequences, which context parallelism cuts, comes first. Where every
    # sequence weighs alike, group-centred advantages would give a loss of nearly 0, and an error
    # relative to it would mean nothing.
    "gspo": {"loss": "gspo", "advantage": "batch_normalized", "aggregation": "sequence_mean"},
    "gmpo": {"loss": "gmpo", "advantage": "batch_normalized", "aggregation": "sequence_mean"},
    "sequence_tis": {
        "correction": "sequence",
        "correction_args": {"high": 1e-4},  # the journal is far from the policy
        "aggregation": "sequence_sum_over_length",
    },
    # Above .25 the journal has answers with ratios of e^15, which multiply what is rounding.
    "geometric": {"correction": "geometric", "correction_args": {"low": 0.05, "high": 0.25}},
    # Shares that a batch of a hundred tokens shows.
    "clip_cov": {
        "loss": "clip_cov",
        "loss_args": {"share": 0.2, "covariance_low": -1.0, "covariance_high": 9.0},
    },
    "kl_cov": {"loss": "kl_cov", "loss_args": {"share": 0.2}},
    "opsm": {"correction": "off_policy_sequence", "correction_args": {"max_divergence": 0.5}},
    "log_linear": {
        **{"old_logprobs": "log_linear", "correction": "token"},
        "advantage": "plain_reward",
    },
    "fresh": {"correction": "fresh", "correction_args": {"max_versions": 1}},
    "reinforce": {"loss": "policy_gradient", "advantage": "plain_reward"},
    "distillation": {"loss": "policy_gradient", "advantage": "reverse_kl"},
    "gkd": {
        "loss": "generalized_jsd",
        "loss_args": {"teacher_share": 0.3},
        "advantage": "reverse_kl",
    },
    "sapo": {"loss": "sapo", "advantage": "group_centered", "aggregation": "sequence_sum"},
    "cispo": {"loss": "cispo", "advantage": "group_centered", "entropy_coef": 0.01},
    "kl": {"loss": "policy_gradient", "kl_coef": 0.1, "kl_estimator": "unbiased"},
    "kl_refresh": {"kl_coef": 0.1, "kl_estimator": "k2", "reference_refresh_steps": 2},
    "ppo": {
        "advantage": "gae",
        "advantage_args": {"gamma": 0.99, "lam": 0.95},
        "aggregation": "sequence_mean",
    },
    "bi_level": {"advantage": "bi_level_gae", "advantage_args": {"lam": 0.9, "turn_gamma": 0.9}},
    "reward_kl": {
        "advantage": "discounted_return",
        "advantage_args": {"gamma": 0.97},
        "aggregation": "sequence_mean",
        "kl_reward_coef": 0.3,
        "kl_reward_target": 2.0,
        "kl_reward_horizon": 40.0,
    },
    "ppo_reward_kl": {"advantage": "gae", "aggregation": "sequence_mean", "kl_reward_coef": 0.2},
    "gigpo": {"advantage": "group_in_group", "loss": "policy_gradient"},
    "old_routes": {"routing_replay": "old_policy"},
    "engine_routes": {"routing_replay": "rollout"},
    "tis": {"correction": "token", "advantage": "leave_one_out", "loss_args": {"dual_clip": 3.0}},
}
"""Fields of `algorithm`."""
PREFERENCES: dict[str, dict[str, Any]] = {
    "dpo": {"loss": "dpo"},
    "rpo": {"loss": "rpo"},
    "ipo": {"loss": "ipo"},
    "cdpo": {"loss": "cdpo"},
    "simpo": {"loss": "simpo"},
    "orpo": {"loss": "orpo"},
    "kto": {"loss": "kto"},
    "reward_model": {"loss": "bradley_terry"},
}
"""The same of stage=preference, and of stage=reward_model."""

SHORT = {
    "sequence_parallel": "sp",
    "distributed_optimizer": "distopt",
    "first_stage_layers": "first",
    "last_stage_layers": "last",
    "recompute": "recompute ",
    "recompute_modules": "",
    "recompute_method": "",
    "recompute_layers": "",
    "logits_chunk_tokens": "chunk",
}


@dataclass(frozen=True)
class Case:
    """One row: a model and its layout."""

    model: str
    parallel: dict[str, Any] = field(default_factory=dict)
    """Fields of `parallel` other than their defaults."""
    ci: bool = False
    """Run for every change; the others at night."""
    memory: dict[str, Any] = field(default_factory=dict)
    """Fields of `memory` other than their defaults; the rank compared with recomputes nothing."""
    planted: bool = False
    """With the mistake that `PLANTED` describes."""
    objective: str = "grpo"
    """A row of OBJECTIVES or of PREFERENCES."""
    offload: bool = False
    """Between steps the whole state leaves the device, as where engines share it."""
    lora: tuple[str, ...] = ()
    """Targets of low-rank adapters, which are trained in place of the model; none: no adapters."""

    @property
    def name(self) -> str:
        """`qwen3 tp2 sp`; one rank: `qwen3`."""
        parts = [self.model] if self.objective == "grpo" else [self.model, self.objective]
        if self.lora:
            few = len(self.lora) < len(LORA_TARGETS)
            parts.append(f"lora{' ' * few}{'+'.join(self.lora) * few}")
        for key, value in [*self.parallel.items(), *self.memory.items()]:
            shown = "" if value is True else value
            shown = "+".join(value) if isinstance(value, list) else shown
            parts.append(f"{SHORT.get(key, key)}{shown}".strip())
        return " ".join([*parts, *["planted"] * self.planted, *["offload"] * self.offload])

    @property
    def world_size(self) -> int:
        """Processes."""
        size = 1
        for key in ("tp", "pp", "cp", "dp"):
            size *= self.parallel.get(key, 1)
        return size


def _case(model: str, *flags: str, ci: bool = False, objective: str = "grpo", **sizes: int) -> Case:
    return Case(model, {**sizes, **dict.fromkeys(flags, True)}, ci, objective=objective)


def _lora(
    model: str,
    *flags: str,
    targets: tuple[str, ...] = LORA_TARGETS,
    ci: bool = False,
    objective: str = "grpo",
    **sizes: int,
) -> Case:
    parallel = {**sizes, **dict.fromkeys(flags, True)}
    return Case(model, parallel, ci, objective=objective, lora=targets)


FULL = {"recompute": "full", "recompute_method": "block", "recompute_layers": 1}
PARTS = {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}
MOE_PARTS = {"recompute": "selective", "recompute_modules": ["core_attn", "moe"]}

PREFERENCES_IN_CI = {("dpo", "dp"), ("kto", "cp")}
SP, OPT, OVERLAP = "sequence_parallel", "distributed_optimizer", "overlap"
FSDP = "fsdp"

CASES = [
    _case("qwen3", tp=2),
    _case("qwen3_tied", SP, tp=2, ci=True),
    _case("qwen3_tied", pp=2),
    _case("llama", pp=2, vpp=2, ci=True),
    _case("qwen3", pp=2, first_stage_layers=1),
    _case("qwen3", cp=2, ci=True),
    _case("llama_tied", dp=2),
    _case("qwen3", OPT, dp=2),
    _case("qwen3", OVERLAP, dp=2),
    _case("qwen3", OPT, OVERLAP, dp=2, ci=True),
    _case("qwen3_tied", OPT, FSDP, dp=2, ci=True),
    _case("qwen3", OPT, FSDP, cp=2, dp=2),
    _case("llama", SP, OPT, FSDP, tp=2, dp=2),
    _case("moe", OPT, FSDP, dp=4, ep=2),
    _case("moe", SP, OPT, FSDP, tp=2, dp=2, ep=2),
    _case("qwen3", OPT, FSDP, dp=2, objective="reward_model"),
    _case("moe", dp=2, ep=2, ci=True),
    _case("moe", cp=2, ep=2),
    _case("moe", cp=2),
    _case("moe", SP, tp=2),
    _case("moe", SP, tp=2, ep=2),
    _case("moe", SP, tp=2, etp=2, ci=True),
    _case("moe_mixed", pp=2),
    _case("qwen3", SP, tp=4),  # above the KV heads
    _case("llama", pp=4),
    _case("qwen3_deep", pp=4, vpp=2),
    _case("llama_tied", cp=4),
    _case("qwen3_tied", SP, tp=2, pp=2, ci=True),
    _case("qwen3", SP, tp=2, cp=2),
    _case("llama_tied", SP, OPT, tp=2, dp=2),
    _case("qwen3_tied", OPT, OVERLAP, pp=2, vpp=2, dp=2),
    _case("moe", SP, tp=2, dp=2, ep=2, etp=2),
    _case("moe", SP, tp=2, dp=2, ep=4),
    _case("moe", OPT, pp=2, dp=2, ep=2),
    _case("moe", OPT, OVERLAP, dp=4, ep=2),
    _case("moe_mixed", pp=2, vpp=2, cp=2, ep=2, ci=True),
    _case("qwen3", SP, OPT, tp=2, pp=2, cp=2),
    _case("qwen3_tied", SP, OPT, OVERLAP, tp=2, pp=2, vpp=2, dp=2),
    _case("qwen3", OPT, pp=2, cp=2, dp=2),
    _case("qwen3_deep", OPT, pp=4, dp=2, first_stage_layers=1, last_stage_layers=1),
    _case("llama", OPT, OVERLAP, dp=8),
    _case("moe", SP, tp=2, pp=2, dp=2, ep=2, etp=2),
    _case("moe", SP, OPT, tp=2, cp=2, dp=2, ep=4, etp=2),
    _case("moe_mixed", SP, OPT, OVERLAP, tp=2, pp=2, vpp=2, cp=2, ep=4),
    _case("glm", SP, tp=2, ep=2),
    _case("glm", OPT, pp=2, vpp=2, cp=2, ep=2),
    _case("deepseek", SP, tp=2, ci=True),
    _case("deepseek", SP, tp=2, cp=2),
    _case("deepseek", cp=2),
    _case("deepseek", SP, OPT, tp=2, pp=2, dp=2, ep=4),
    _case("deepseek_mtp", SP, tp=2),
    _case("deepseek_mtp", pp=2),
    _case("deepseek_mtp", SP, OPT, tp=2, pp=2, vpp=2, ep=2),
    _case("deepseek_mtp", OPT, dp=2),
    _case("deepseek_mtp", cp=2),
    _case("qwen3", cp=2, objective="gspo", ci=True),
    _case("qwen3", cp=2, objective="clip_cov", ci=True),
    _case("qwen3", OPT, OVERLAP, dp=2, objective="kl"),
    _case("qwen3", OPT, OVERLAP, dp=2, objective="kl_refresh"),
    *(
        _case("qwen3", *flags, ci=False, objective=objective, **sizes)
        for objective, fields in OBJECTIVES.items()
        if objective != "grpo" and "routing_replay" not in fields  # these need experts
        for flags, sizes in (((SP,), {"tp": 2, "cp": 2}), ((OPT,), {"pp": 2, "dp": 2}))
    ),
    *(
        _case(
            "qwen3", *flags, objective=objective, ci=(objective, ci) in PREFERENCES_IN_CI, **sizes
        )
        for objective in PREFERENCES
        for ci, flags, sizes in (
            ("dp", (OPT, OVERLAP), {"dp": 2}),
            ("tp", (SP,), {"tp": 2}),
            ("pp", (), {"pp": 2}),
            ("cp", (), {"cp": 2}),
        )
    ),
    _case("moe", SP, OPT, tp=2, cp=2, dp=2, ep=4, etp=1, objective="rpo"),
    _case("moe", SP, tp=2, cp=2, objective="engine_routes", ci=True),
    _case("moe", dp=2, ep=2, objective="engine_routes"),
    _case("moe_mixed", pp=2, vpp=2, cp=2, ep=2, objective="engine_routes"),
    _case("moe", SP, OPT, FSDP, tp=2, dp=2, ep=2, objective="engine_routes"),
    _case("glm", SP, tp=2, ep=2, objective="engine_routes"),
    _case("deepseek", SP, OPT, tp=2, pp=2, dp=2, ep=4, objective="engine_routes"),
    _case("moe", SP, tp=2, objective="old_routes"),
    _case("moe_mixed", pp=2, vpp=2, cp=2, ep=2, objective="old_routes"),
    Case("moe_mixed", {"pp": 2}, memory={"recompute": "full"}, objective="engine_routes"),
    Case("moe_mixed", {"pp": 2, "vpp": 2}, memory=MOE_PARTS, objective="engine_routes"),
    Case("moe", {"pp": 2, "dp": 2, "ep": 2}, memory=MOE_PARTS, objective="old_routes"),
    Case("llama", {}, ci=True, memory={"recompute": "full"}),
    Case("moe", {"dp": 2, "ep": 2}, memory=MOE_PARTS),
    Case("qwen3_tied", {"tp": 2, SP: True}, ci=True, memory={"logits_chunk_tokens": 20}),
    Case("qwen3", {"cp": 2}, memory={"logits_chunk_tokens": 7}),
    Case("qwen3", {"tp": 2, SP: True}, memory={"logits_chunk_tokens": 20}, objective="gkd"),
    Case("moe", {"dp": 2, "ep": 2, OPT: True}, ci=True, offload=True),
    Case("qwen3_tied", {"pp": 2}, offload=True),
    Case("qwen3", {"dp": 2, OPT: True}, objective="ppo", offload=True),
    Case("qwen3_tied", {}, memory=PARTS),
    Case("llama", {}, memory={**FULL, "recompute_layers": 3}),
    Case("qwen3_tied", {"tp": 2, SP: True, "pp": 2, "vpp": 2}, memory=FULL),
    Case("qwen3", {"tp": 2, SP: True, "cp": 2, "dp": 2, OPT: True, OVERLAP: True}, memory=PARTS),
]

ATTENTION = ATTENTION_TARGETS
SOME = ("k_proj", "o_proj", "up_proj")
"""Of each fused linear a part, and one that is cut the other way."""
CASES += [
    _lora("qwen3_tied", SP, OPT, tp=2, dp=2, ci=True),
    _lora("llama", tp=2),
    _lora("qwen3", SP, tp=4),  # above the KV heads: q, k and v on ranks of their own
    _lora("qwen3", SP, tp=4, targets=SOME),
    _lora("qwen3_tied", pp=2, vpp=2),
    _lora("qwen3", cp=2),
    _lora("qwen3", OPT, OVERLAP, dp=2),
    _lora("qwen3_tied", SP, OPT, OVERLAP, tp=2, pp=2, vpp=2, dp=2),
    _lora("moe", SP, OPT, tp=2, cp=2, dp=2, ep=4, etp=1, targets=ATTENTION),
    _lora("glm", SP, tp=2, ep=2, targets=ATTENTION),
    _lora("qwen3", SP, tp=2, cp=2, objective="gspo"),
    _lora("qwen3", OPT, pp=2, dp=2, objective="kl"),
    _lora("qwen3", SP, tp=2, objective="dpo"),
    _lora("qwen3", SP, OPT, tp=2, dp=2, objective="reward_model"),
    _lora("qwen3", pp=2, objective="reward_model"),
    Case("llama", {"tp": 2, SP: True}, memory={"recompute": "full"}, lora=LORA_TARGETS),
    Case("qwen3_tied", {}, memory=PARTS, lora=("down_proj",)),
    Case("qwen3", {"dp": 2, OPT: True}, offload=True, lora=LORA_TARGETS),
]

PLANTED = Case("qwen3_tied", {"tp": 2, SP: True}, ci=True, planted=True)
"""The norms' gradients are not summed over tensor-parallel ranks, each of which saw half of the
sequence: no error, the first loss is right, and the table must tell."""
