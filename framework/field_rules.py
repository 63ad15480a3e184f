"""What each field may hold by itself: choices, signs, ranges, rows of our own tables."""

import math
from collections.abc import Iterator
from typing import Any

from framework.config import RunConfig
from framework.config_fields import config_fields
from framework.source_facts import table_keys

CHOICES = {
    "mode": ("train", "rollout_only", "train_only", "eval"),
    "stage": ("rl", "sft", "preference", "reward_model"),
    "model.dtype": ("float32", "bfloat16"),
    "model.fp8": ("none", "hybrid", "e4m3"),
    "model.fp8_recipe": ("tensorwise", "delayed", "blockwise", "mxfp8"),
    "memory.recompute": ("none", "selective", "full"),
    "memory.recompute_method": ("uniform", "block"),
    "rollout.engine.dtype": ("float32", "bfloat16"),
    "rollout.engine.device": ("auto", "cpu", "cuda"),
    "rollout.engine.router_policy": ("power_of_two", "round_robin", "random", "cache_aware"),
    "algorithm.aggregation": (
        "token_mean",
        "sequence_mean",
        "sequence_sum",
        "sequence_sum_over_length",
    ),
    "algorithm.reference_on": ("host", "device"),
    "algorithm.routing_replay": ("none", "old_policy", "rollout"),
    "batch.overlong": ("refuse", "truncate"),
    "weight_sync.pause_mode": ("retract", "in_place"),
    "weight_sync.quantization": ("none", "fp8_rounded", "mxfp4_rounded", "int2_rounded", "fp8"),
    "cluster.launcher": ("local", "slurm", "manual"),
}
POSITIVE = (
    "num_steps",
    "model.vocab_pad_multiple",
    "model.lora.alpha",
    "model.tiny.num_layers",
    "model.tiny.hidden_size",
    "model.tiny.num_heads",
    "model.tiny.num_kv_heads",
    "model.tiny.ffn_size",
    "model.tiny.experts_per_token",
    *(f"parallel.{name}" for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp", "timeout_s")),
    "memory.recompute_layers",
    "memory.logits_chunk_tokens",
    "profile.num_steps",
    "algorithm.kl_reward_horizon",
    "algorithm.updates_per_step",
    "critic.lr",
    "optimizer.lr",
    "optimizer.eps",
    "optimizer.clip_grad",
    "batch.max_tokens_per_microbatch",
    "rollout.prompts_per_step",
    "rollout.samples_per_prompt",
    "rollout.sampling.temperature",
    "rollout.sampling.max_new_tokens",
    "rollout.engine.num_engines",
    "rollout.engine.tp",
    "rollout.engine.max_total_tokens",
    "rollout.engine.max_running_requests",
    "rollout.engine.start_timeout_s",
    "rollout.engine.request_timeout_s",
    "rollout.batch_timeout_s",
    "rollout.reconnect_timeout_s",
    "rollout.keep_share",
    "rollout.max_refills",
    "rollout.max_body_bytes",
    "data.eval_num_prompts",
    "data.episode_timeout_s",
    "data.timeout_s",
    "data.curriculum.floor",
    "data.curriculum.memory_steps",
    "weight_sync.bucket_mb",
    "weight_sync.timeout_s",
    "gate.logprob_abs_diff_max",
    "gate.logprob_abs_diff_max_bf16",
    "warm_start.batch_size",
    "warm_start.lr",
    "preference.batch_size",
    "checkpoint.timeout_s",
    "cluster.num_nodes",
    "cluster.gpus_per_node",
    "cluster.cpus_per_task",
    "cluster.trainer_nodes",
    "cluster.stop_timeout_s",
    "cluster.restart_window_s",
)
NOT_NEGATIVE = (
    "profile.first_step",
    "seed",
    "parallel.first_stage_layers",
    "parallel.last_stage_layers",
    "model.lora.rank",
    "model.tiny.init_seed",
    "model.tiny.num_experts",
    "algorithm.entropy_coef",
    "algorithm.kl_coef",
    "algorithm.kl_reward_coef",
    "algorithm.kl_reward_target",
    "algorithm.reference_refresh_steps",
    "critic.warmup_steps",
    "critic.value_clip",
    "critic.policy_starts_at_step",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "rollout.max_staleness_steps",
    "rollout.oversample",
    "rollout.teacher_top_k",
    "rollout.engine.max_retries",
    "rollout.agent_port",
    "rollout.port",
    "data.max_concurrency",
    "data.eval_temperature",
    "data.overlong_penalty",
    "data.overlong_share",
    "warm_start.num_steps",
    "warm_start.warmup_steps",
    "warm_start.weight_decay",
    "weight_sync.full_every_pushes",
    "gate.logprob_abs_diff_max_quantized",
    "eval.every_steps",
    "eval.target_accuracy",
    "eval.target_gain",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.keep_every_steps",
    "cluster.engine_nodes",
    "cluster.max_restarts",
    "cluster.watchdog_s",
)
SHARES = (
    "rollout.keep_share",
    "data.curriculum.floor",
    "data.overlong_share",
    "eval.target_accuracy",
    "eval.target_gain",
)
FRACTIONS = ("optimizer.beta1", "optimizer.beta2", "warm_start.beta2")
TABLES = {
    "algorithm.old_logprobs": ("framework", "algorithm/proximal.py", "PROXIMALS"),
    "algorithm.kl_estimator": ("framework", "algorithm/kl.py", "KL_ESTIMATORS"),
    "cluster.gpu": ("framework", "gpus.py", "GPUS"),
    "weight_sync.transport": ("framework", "weight_sync/__init__.py", "TRANSPORTS"),
    "data.task": ("rollout", "environments/__init__.py", "ENVIRONMENTS"),
    "data.reward": ("rollout", "rewards/__init__.py", "REWARDS"),
}
OWN = {"data.task": ", or package.module.Class", "data.reward": ", or package.module.function"}
"""Keys that also take code of the user's."""


def value_of(config: RunConfig, key: str) -> Any:
    """The value at a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def field_errors(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, error) for every field whose value is impossible whatever the others are."""
    for key in config_fields():
        value = value_of(config, key)
        if problem := _problem(key, value):
            yield key, f"{key}={value}: {problem}"


def _problem(key: str, value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number is wanted"
    if key in POSITIVE and not value > 0:
        return "must be greater than 0"
    if key in NOT_NEGATIVE and value < 0:
        return "must not be negative"
    if key in SHARES and value > 1:
        return "a share is at most 1"
    if key == "data.curriculum.memory_steps" and value < 1:
        return "must be at least 1"
    if key in FRACTIONS and not 0 <= value < 1:
        return "must be in [0, 1)"
    options = CHOICES.get(key) or (table_keys(*TABLES[key]) if key in TABLES else None)
    own = key in OWN and "." in str(value)  # looked at once all else is right
    if options is not None and value not in options and not own:
        return f"must be one of {', '.join(options)}{OWN.get(key, '')}"
    if key == "name" and (not value or "/" in str(value)):
        return "a directory name is wanted"
    if key in ("rollout.port", "rollout.agent_port") and value > 65535:
        return "a port is at most 65535 (0: any free one)"
    return None
