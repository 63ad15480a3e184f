"""Checks of what is handed on to others: SGLang's arguments and megatron-core's fields.

Names are checked against the installed versions' own sources, without importing them; a field that
Drivetrain sets itself is refused with the key that sets it.
"""

from collections.abc import Iterator
from typing import Any

from framework.config import RunConfig
from framework.config_fields import nearest
from framework.source_facts import MissingPackage, megatron_config_fields
from rollout.server.arguments import check_names

MEGATRON_OWNED = {
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp",
    "context_parallel_size": "parallel.cp",
    "expert_model_parallel_size": "parallel.ep",
    "expert_tensor_parallel_size": "parallel.etp",
    "sequence_parallel": "parallel.sequence_parallel",
    "params_dtype": "model.dtype",
    "pipeline_dtype": "model.dtype",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "fp8": "model.fp8",
    "fp8_recipe": "model.fp8_recipe",
    "recompute_granularity": "memory.recompute",
    "recompute_modules": "memory.recompute_modules",
    "recompute_method": "memory.recompute_method",
    "recompute_num_layers": "memory.recompute_layers",
    "moe_layer_recompute": "memory.recompute_modules",
    "moe_enable_routing_replay": "algorithm.routing_replay",
    "num_layers": "the model's config.json",
    "mtp_num_layers": "model.mtp",
    "mtp_use_repeated_layer": "the model's config.json",
    "mtp_hybrid_override_pattern": "the model's config.json",
    "hidden_size": "the model's config.json",
    "num_attention_heads": "the model's config.json",
    "num_query_groups": "the model's config.json",
    "ffn_hidden_size": "the model's config.json",
    "kv_channels": "the model's config.json",
    "layernorm_epsilon": "the model's config.json",
    "normalization": "the model's config.json",
    "calculate_per_token_loss": "algorithm.aggregation",
    "variable_seq_lengths": "how micro-batches are packed",
    # Interleaved stages are silently wrong under other flags than ours.
    "overlap_p2p_comm": "parallel.vpp",
    "batch_p2p_comm": "parallel.vpp",
    "microbatch_group_size_per_vp_stage": "parallel.pp",
    "num_layers_in_first_pipeline_stage": "parallel.first_stage_layers",
    "num_layers_in_last_pipeline_stage": "parallel.last_stage_layers",
    "account_for_embedding_in_pipeline_split": "parallel.first_stage_layers",
    "account_for_loss_in_pipeline_split": "parallel.last_stage_layers",
    "pipeline_model_parallel_layout": "parallel.first_stage_layers",
    "num_moe_experts": "the model's config.json",
    "moe_ffn_hidden_size": "the model's config.json",
    "moe_layer_freq": "the model's config.json",
    "moe_router_topk": "the model's config.json",
    "moe_router_pre_softmax": "the model's config.json",
    "moe_router_score_function": "the model's config.json",
}
DROPOUT = ("hidden_dropout", "attention_dropout")
PLAIN_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
    "str": (str,),
}


def passthrough_errors(config: RunConfig) -> Iterator[str]:
    """One line for every key under rollout.engine.args and model.megatron that cannot work."""
    if config.rollout.engine.args:
        try:
            yield from check_names(config.rollout.engine.args)
        except ValueError as error:
            yield f"rollout.engine.args: cannot be checked: {error}"
    if config.model.megatron:
        try:
            yield from _megatron(config.model.megatron, megatron_config_fields())
        except MissingPackage as error:
            yield f"model.megatron: cannot be checked: {error}"


def _megatron(values: dict[str, Any], fields: dict[str, str]) -> Iterator[str]:
    for name, value in values.items():
        key = f"model.megatron.{name}"
        if name in MEGATRON_OWNED:
            yield f"{key}={value}: set by Drivetrain from {MEGATRON_OWNED[name]}"
        elif name not in fields:
            guess = nearest(name, fields)
            hint = f"; did you mean model.megatron.{guess}?" if guess else ""
            yield f"{key}={value}: the installed megatron-core has no such field{hint}"
        elif name in DROPOUT and value != 0:
            yield f"{key}={value}: must be 0; dropout makes trainer and engine disagree"
        elif problem := _type_problem(fields[name], value):
            yield f"{key}={value}: {problem}"


def _type_problem(annotation: str, value: Any) -> str | None:
    """Why `value` is not of a plain annotation; None where it is or the type is not plain."""
    plain = annotation.removeprefix("Optional[").removesuffix("]")
    if plain.endswith(" | None"):
        plain = plain.removesuffix(" | None")
    optional = plain != annotation
    accepted = PLAIN_TYPES.get(plain)
    if accepted is None or (optional and value is None):
        return None
    if isinstance(value, bool) and bool not in accepted:
        return f"{plain} wanted"
    return None if isinstance(value, accepted) else f"{plain} wanted"
