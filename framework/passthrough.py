"""Checks of what is handed on to others: SGLang's arguments and megatron-core's fields.

Names and plain types are checked against the installed versions' own sources, without importing
them; a field that Drivetrain sets itself is refused with the key that sets it.
"""

from collections.abc import Iterator
from typing import Any

from framework.config import RunConfig
from framework.config_fields import nearest
from framework.source_facts import MissingPackage, megatron_config_fields, sglang_server_args

ENGINE_OWNED = {
    "model_path": "model.hf_path",
    "tokenizer_path": "model.hf_path",
    "load_format": "model.hf_path",
    "host": "the run directory",
    "port": "the run directory",
    "api_key": "rollout.engine.api_key",
    "admin_api_key": "rollout.engine.api_key",
    "tp_size": "rollout.engine.tp",
    "device": "rollout.engine.device",
    "dtype": "rollout.engine.dtype",
    "max_total_tokens": "rollout.engine.max_total_tokens",
    "max_running_requests": "rollout.engine.max_running_requests",
    "enable_deterministic_inference": "rollout.engine.deterministic",
}
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
    "num_layers": "the model's config.json",
    "hidden_size": "the model's config.json",
    "num_attention_heads": "the model's config.json",
    "num_query_groups": "the model's config.json",
    "ffn_hidden_size": "the model's config.json",
    "kv_channels": "the model's config.json",
    "layernorm_epsilon": "the model's config.json",
    "normalization": "the model's config.json",
    "calculate_per_token_loss": "algorithm.aggregation",
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
        yield from _check(
            "rollout.engine.args",
            config.rollout.engine.args,
            sglang_server_args,
            ENGINE_OWNED,
            "SGLang's ServerArgs",
        )
    if config.model.megatron:
        yield from _check(
            "model.megatron",
            config.model.megatron,
            megatron_config_fields,
            MEGATRON_OWNED,
            "megatron-core's TransformerConfig",
        )
        for name in DROPOUT:
            if config.model.megatron.get(name, 0) != 0:
                yield (
                    f"model.megatron.{name}={config.model.megatron[name]}: must be 0; with dropout "
                    "the trainer's log-probs are not the policy's"
                )


def _check(
    prefix: str, values: dict[str, Any], read_fields: Any, owned: dict[str, str], owner: str
) -> Iterator[str]:
    try:
        fields: dict[str, str] = read_fields()
    except MissingPackage as error:
        yield f"{prefix}: cannot be checked: {error}"
        return
    for name, value in values.items():
        key = f"{prefix}.{name}"
        if name in owned:
            yield f"{key}={value}: set by Drivetrain from {owned[name]}"
        elif name not in fields:
            guess = nearest(name, fields)
            hint = f"; did you mean {prefix}.{guess}?" if guess else ""
            yield f"{key}={value}: not a field of the installed {owner}{hint}"
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
