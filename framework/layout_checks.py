"""Which trainer and engine layouts can hold a model, told from its config.json alone."""

from collections.abc import Iterator

from framework.cluster_checks import on_gpus
from framework.config import ParallelConfig, RunConfig
from framework.model_shape import ModelShape
from framework.preference_checks import needs_reference

FUSED_SHARED_EXPERTS = ("DeepseekV3ForCausalLM", "Glm4MoeForCausalLM")
"""Architectures whose shared expert SGLang makes one of the routed ones, on GPUs and unasked."""


def layout_errors(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    """One line for everything in `parallel` and `rollout.engine.tp` that this model rules out."""
    parallel = config.parallel
    yield from _tensor_parallel(parallel, shape)
    yield from _pipeline(parallel, shape)
    yield from _experts(parallel, shape)
    if parallel.fsdp:
        yield from _fsdp(config)
    if parallel.sequence_parallel and parallel.tp == 1:
        yield "parallel.sequence_parallel=True: needs parallel.tp of at least 2"
    shortest = 2 * parallel.cp
    if parallel.cp > 1 and shortest > config.batch.max_tokens_per_microbatch:
        yield (
            f"parallel.cp={parallel.cp}: every sequence is padded to a multiple of 2 * cp = "
            f"{shortest} tokens, more than batch.max_tokens_per_microbatch="
            f"{config.batch.max_tokens_per_microbatch}"
        )
    yield from _engine(config.rollout.engine.tp, shape)
    engines = config.stage == "rl" and config.mode != "train_only"
    odd = shape.tied or shape.has_dense_layers
    if engines and odd and shape.architecture == "Qwen3MoeForCausalLM":
        yield (
            f"model.hf_path={config.model.hf_path}: SGLang serves Qwen3-MoE only with experts in "
            "every layer and tie_word_embeddings=false"
        )
    if engines:
        yield from _engine_table(config, shape.architecture)
    if not config.model.hf_path:
        yield from _tiny(config)


def _engine_table(config: RunConfig, architecture: str) -> Iterator[str]:
    sync, engine = config.weight_sync, config.rollout.engine
    by_parameter = sync.transport in ("direct", "delta")
    fuses = architecture in FUSED_SHARED_EXPERTS and on_gpus(config) and not engine.urls
    if fuses and not engine.args.get("disable_shared_experts_fusion"):
        needs = [f"weight_sync.transport={sync.transport}"] * by_parameter
        for key in [*needs, *["weight_sync.verify=True"] * sync.verify]:
            yield (
                f"{key}: on GPUs SGLang puts the shared expert of {architecture} among the routed "
                "ones, where its parts are not known here; set "
                "+rollout.engine.args.disable_shared_experts_fusion=true"
            )
    latent = architecture == "DeepseekV3ForCausalLM"
    if latent and not (on_gpus(config) or engine.urls or engine.deterministic):
        yield (
            "rollout.engine.deterministic=False: on a CPU SGLang computes latent attention right "
            "only with deterministic inference; set it to true"
        )
    quantized = engine.args.get("quantization")
    if by_parameter and quantized is not None:
        yield (
            f"weight_sync.transport={sync.transport}: writes into the parameters of the model, and "
            f"rollout.engine.args.quantization={quantized} gives engines others; use distributed"
        )


def _tensor_parallel(parallel: ParallelConfig, shape: ModelShape) -> Iterator[str]:
    tp = parallel.tp
    if shape.num_heads % tp:
        yield f"parallel.tp={tp}: does not divide the model's {shape.num_heads} attention heads"
    kv = max(1, shape.num_kv_heads)
    if kv % tp and tp % kv:
        yield f"parallel.tp={tp}: neither divides nor is a multiple of the {kv} key-value heads"
    if shape.has_dense_layers and shape.ffn_size % tp:
        yield f"parallel.tp={tp}: does not divide the feed-forward size {shape.ffn_size}"


def _pipeline(parallel: ParallelConfig, shape: ModelShape) -> Iterator[str]:
    pp, vpp, layers = parallel.pp, parallel.vpp, shape.num_layers
    if pp == 1:
        for key, unset in (("vpp", 1), ("first_stage_layers", 0), ("last_stage_layers", 0)):
            if getattr(parallel, key) != unset:
                yield f"parallel.{key}={getattr(parallel, key)}: needs parallel.pp of at least 2"
        return
    ends = {
        f"parallel.{key}": getattr(parallel, key)
        for key in ("first_stage_layers", "last_stage_layers")
        if getattr(parallel, key)
    }
    for key, size in ends.items():
        if size % vpp:
            yield f"{key}={size}: must be a multiple of parallel.vpp={vpp}"
    rest, even = layers - sum(ends.values()), pp - len(ends)
    if rest < 0 or (even == 0 and rest):
        named = ", ".join(f"{key}={size}" for key, size in ends.items())
        yield f"{named}: the model has {layers} layers for parallel.pp={pp} stages"
    elif even and rest % even:
        which = f"the {rest} layers left" if ends else f"the model's {layers} layers"
        yield f"parallel.pp={pp}: does not divide {which}" + (f" over {even} stages" * bool(ends))
    elif even and rest // even % vpp:
        yield f"parallel.vpp={vpp}: does not divide the {rest // even} layers of a pipeline stage"


def _experts(parallel: ParallelConfig, shape: ModelShape) -> Iterator[str]:
    ep, etp, tp = parallel.ep, parallel.etp, parallel.tp
    ranks = tp * parallel.cp * parallel.dp
    if not shape.num_experts:
        for key, size in (("ep", ep), ("etp", etp)):
            if size > 1:
                yield f"parallel.{key}={size}: {shape.architecture} has no experts; must be 1"
        return
    if shape.num_experts % ep:
        yield f"parallel.ep={ep}: does not divide the model's {shape.num_experts} experts"
    if shape.expert_ffn_size % etp:
        yield f"parallel.etp={etp}: does not divide the experts' width {shape.expert_ffn_size}"
    if ranks % (ep * etp):
        yield (
            f"parallel.ep={ep}: ep * etp = {ep * etp} must divide the {ranks} ranks of a pipeline "
            "stage (tp * cp * dp)"
        )
    if tp > 1 and not parallel.sequence_parallel:
        yield (
            "parallel.sequence_parallel=False: megatron-core trains experts under "
            f"parallel.tp={tp} with sequence parallelism only; set it to true"
        )


def _fsdp(config: RunConfig) -> Iterator[str]:
    key, parallel = "parallel.fsdp=True", config.parallel
    if not parallel.distributed_optimizer:
        yield f"{key}: cuts the optimizer's state too; set parallel.distributed_optimizer=true"
    if parallel.pp > 1:
        yield f"{key}: megatron-core 0.19 cannot cut pipeline stages so; parallel.pp={parallel.pp}"
    if needs_reference(config):
        yield (
            f"{key}: a reference policy (algorithm.kl_coef={config.algorithm.kl_coef:g}, "
            f"kl_reward_coef={config.algorithm.kl_reward_coef:g}, stage={config.stage}) "
            "takes turns with whole parameters; set parallel.fsdp=false"
        )
    if config.rollout.engine.colocated and config.stage == "rl":
        yield f"{key}: its buffers cannot leave the device; set rollout.engine.colocated=false"


def _engine(tp: int, shape: ModelShape) -> Iterator[str]:
    kv = max(1, shape.num_kv_heads)
    if shape.num_heads % tp or (kv % tp and tp % kv):
        yield (
            f"rollout.engine.tp={tp}: does not fit {shape.num_heads} attention heads and "
            f"{kv} key-value heads"
        )


def _tiny(config: RunConfig) -> Iterator[str]:
    tiny = config.model.tiny
    if tiny.hidden_size % tiny.num_heads:
        yield (
            f"model.tiny.num_heads={tiny.num_heads}: does not divide model.tiny.hidden_size="
            f"{tiny.hidden_size}"
        )
    if tiny.num_heads % tiny.num_kv_heads:
        yield (
            f"model.tiny.num_kv_heads={tiny.num_kv_heads}: does not divide "
            f"model.tiny.num_heads={tiny.num_heads}"
        )
    if tiny.num_experts and tiny.experts_per_token > tiny.num_experts:
        yield (
            f"model.tiny.experts_per_token={tiny.experts_per_token}: more than "
            f"model.tiny.num_experts={tiny.num_experts}"
        )
    if tiny.num_experts and tiny.tied and not config.model.hf_path:
        yield "model.tiny.tied=True: SGLang serves a Qwen3-MoE with an output layer of its own only"
