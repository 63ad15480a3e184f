"""Build the policy: megatron-core's GPTModel from a Hugging Face config, wrapped for training."""

import dataclasses
import importlib.util
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_align_size
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from framework.config import MemoryConfig, ModelConfig, OptimizerConfig, ParallelConfig
from framework.megatron.fsdp import FullyShardedDataParallel, gather, shard
from framework.megatron.mtp import MTP_SETTINGS, MtpModel, mtp_block_spec
from framework.megatron.parallel import Mesh
from framework.megatron.score_head import ScoreHead
from framework.megatron.torch_spec import torch_block_spec
from framework.memory_checks import WITHOUT_OUTPUT
from megatron_bridge.layout import padded_vocab_size
from megatron_bridge.models import describe
from megatron_bridge.models.score_head import has_score_head

APEX_FUSION = "fused_weight_gradient_mlp_cuda"
"""The extension that an apex built from NVIDIA's source has, and its namesake has not."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Longest rotary table; megatron builds it lazily, by the longest sequence of a batch.
MAX_POSITIONS = 1 << 20


@dataclasses.dataclass
class Policy:
    """The model chunks of one rank, with their gradients and optimizer."""

    config: TransformerConfig
    hf_config: dict[str, Any]
    vocab_size: int
    """Real tokens; the parameters are padded beyond."""
    chunks: list[GPTModel]
    """The bare models, one per virtual pipeline stage."""
    wrapped: list[DistributedDataParallel]
    """The same, with gradient buffers and data-parallel reduction; under parallel.fsdp of
    FullyShardedDataParallel, which offers the same but for the buffers."""
    optimizer: MegatronOptimizer

    def sync_parameters(self) -> None:
        """Bring in what other ranks have updated; collective. Before anything reads parameters."""
        for model in self.wrapped:
            if isinstance(model, FullyShardedDataParallel):
                gather(model)
            elif model.ddp_config.overlap_param_gather:
                model.disable_forward_pre_hook(param_sync=True)
                model.enable_forward_pre_hook()

    def set_learning_rate(self, lr: float) -> None:
        """Learning rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr


def uses_transformer_engine() -> bool:
    """One answer for specs and parameter names: TE where it is installed and can run."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def read_hf_config(hf_dir: str | Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory."""
    return json.loads((Path(hf_dir) / "config.json").read_text())


def machine_settings(*, gpu: bool, transformer_engine: bool, apex: bool) -> dict[str, bool]:
    """TransformerConfig's fields that depend on what the machine has, and on nothing else."""
    return {
        "use_cpu_initialization": not gpu,
        "gradient_accumulation_fusion": gpu and apex,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": gpu,
        "bias_activation_fusion": gpu,
        "apply_rope_fusion": transformer_engine,
        "moe_grouped_gemm": transformer_engine,
    }


def memory_settings(model: ModelConfig, memory: MemoryConfig) -> dict[str, Any]:
    """TransformerConfig's fields of recomputation and fp8."""
    settings: dict[str, Any] = {}
    if memory.recompute != "none":
        settings["recompute_granularity"] = memory.recompute
    if memory.recompute == "selective":
        settings["recompute_modules"] = list(memory.recompute_modules)
    if memory.recompute == "full":
        settings["recompute_method"] = memory.recompute_method
        settings["recompute_num_layers"] = memory.recompute_layers
    if model.fp8 != "none":
        settings["fp8"] = model.fp8
        settings["fp8_recipe"] = model.fp8_recipe
    return settings


def token_grain(model: ModelConfig) -> int:
    """What a rank's number of tokens must be a multiple of for fp8's matrix products (else 1)."""
    if model.fp8 == "none":
        return 1
    return get_fp8_align_size(Fp8Recipe(model.fp8_recipe))


def transformer_config(
    hf_config: dict[str, Any],
    model: ModelConfig,
    parallel: ParallelConfig,
    memory: MemoryConfig | None = None,
) -> TransformerConfig:
    """megatron-core's configuration: the architecture's table, the layout, and this machine.

    `model.megatron` overrides last. Dropout is 0: the trainer computes what the engine computes.

    Raises:
        ValueError: fp8 or a recomputation is wanted that only Transformer Engine can do.
    """
    memory = memory or MemoryConfig()
    if not uses_transformer_engine():
        if model.fp8 != "none":
            raise ValueError(f"model.fp8={model.fp8}: needs transformer_engine and a GPU")
        named = set(WITHOUT_OUTPUT) & set(memory.recompute_modules)
        if memory.recompute == "selective" and named:
            raise ValueError(
                f"memory.recompute_modules={memory.recompute_modules}: "
                f"{', '.join(sorted(named))}: needs transformer_engine and a GPU"
            )
    dtype = DTYPES[model.dtype]
    interleaved = parallel.vpp > 1
    settings: dict[str, Any] = {
        **describe(hf_config).transformer,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if interleaved else None,
        "context_parallel_size": parallel.cp,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp,
        "num_layers_in_first_pipeline_stage": parallel.first_stage_layers or None,
        "num_layers_in_last_pipeline_stage": parallel.last_stage_layers or None,
        "sequence_parallel": parallel.sequence_parallel,
        # Packed micro-batches differ in length, so pipeline stages exchange shapes; megatron then
        # insists on this dispatcher even for dense models.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # Interleaved stages are silently wrong with batched point-to-point communication.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        # Losses arrive divided by the global count already (see step.py): gradients are summed.
        "calculate_per_token_loss": True,
        "deallocate_pipeline_outputs": True,
        "perform_initialization": False,
        **machine_settings(
            gpu=torch.cuda.is_available(),
            transformer_engine=uses_transformer_engine(),
            # Megatron-FSDP takes gradients from `.grad`, unless Transformer Engine >= 2.10 fuses.
            apex=not parallel.fsdp and importlib.util.find_spec(APEX_FUSION) is not None,
        ),
        **memory_settings(model, memory),
    }
    if settings.get("mtp_num_layers"):
        settings |= MTP_SETTINGS
    latent = settings.get("multi_latent_attention", False)
    if latent and not _fuses_latent_rope(settings):
        settings["apply_rope_fusion"] = False
    settings.update(model.megatron)
    return (MLATransformerConfig if latent else TransformerConfig)(**settings)


def _fuses_latent_rope(settings: dict[str, Any]) -> bool:
    """Whether the kernel for latent attention can: YaRN only, head sizes that are powers of 2."""
    sizes = (settings[name] for name in ("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"))
    return settings.get("rope_type") != "rope" and all(size & (size - 1) == 0 for size in sizes)


def build_chunks(
    hf_config: dict[str, Any], config: TransformerConfig, vocab_pad_multiple: int
) -> list[GPTModel]:
    """The bare models of this rank, one per virtual pipeline stage, weights not yet loaded."""
    description = describe(hf_config)
    padded = padded_vocab_size(
        description.shape.vocab_size, vocab_pad_multiple, config.tensor_model_parallel_size
    )
    stages = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(stages) if stages else [None]:
        spec: Any  # the annotation of GPTModel knows only one of the two kinds it takes
        if uses_transformer_engine():
            spec = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=stage)
        else:
            spec = torch_block_spec(config, vp_stage=stage)
        place: dict[str, Any] = {"ignore_virtual": False, "vp_stage": stage}
        build: Any = GPTModel
        if config.mtp_num_layers:
            build = partial(MtpModel, real_vocab_size=description.shape.vocab_size)
        chunk = build(
            config=config,
            transformer_layer_spec=spec,
            mtp_block_spec=mtp_block_spec(config, spec, stage, te=uses_transformer_engine()),
            vocab_size=padded,
            max_sequence_length=MAX_POSITIONS,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            vp_stage=stage,
            **description.gpt,
        )
        if chunk.post_process and has_score_head(hf_config):
            setattr(chunk, "output_layer", ScoreHead(config))  # noqa: B010  # of another type
        meta = torch.get_default_device().type == "meta"
        chunks.append(chunk if meta else chunk.cuda())  # the CPU where there is no CUDA
    return chunks


def build_policy(
    hf_config: dict[str, Any],
    model: ModelConfig,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    load_weights: Any,
    memory: MemoryConfig | None = None,
) -> Policy:
    """Build, load and wrap the policy.

    Args:
        load_weights: called with the bare chunks before the optimizer copies their parameters.
    """
    logging.getLogger("megatron").setLevel(logging.ERROR)
    config = transformer_config(hf_config, model, parallel, memory)
    chunks = build_chunks(hf_config, config, model.vocab_pad_multiple)
    load_weights(chunks)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap,
        overlap_param_gather=parallel.overlap and parallel.distributed_optimizer,
        use_distributed_optimizer=parallel.distributed_optimizer,
        check_for_nan_in_grad=True,
        average_in_collective=False,
    )
    wrapped = []
    for i, chunk in enumerate(chunks):
        module = Float16Module(config, chunk) if config.bf16 else chunk
        if parallel.fsdp:
            wrapped.append(shard(config, module))
        else:
            wrapped.append(DistributedDataParallel(config, ddp, module, disable_bucketing=i > 0))
    megatron_optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=optimizer.lr,
            min_lr=0.0,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_eps=optimizer.eps,
            clip_grad=optimizer.clip_grad,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=parallel.distributed_optimizer,
            overlap_param_gather=ddp.overlap_param_gather and not parallel.fsdp,
        ),
        wrapped,
    )
    # The loss is divided by the global count before the backward pass, so nothing is left to scale.
    config.finalize_model_grads_func = lambda models, num_tokens, **rest: finalize_model_grads(
        models, None, **rest
    )
    config.grad_scale_func = megatron_optimizer.scale_loss
    if parallel.overlap and not parallel.fsdp:
        # Not the last micro-batch: gradients only add up.
        no_sync: Any = [each.no_sync for each in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    for each in wrapped:
        each.train()
    return Policy(
        config=config,
        hf_config=hf_config,
        vocab_size=describe(hf_config).shape.vocab_size,
        chunks=chunks,
        wrapped=wrapped,
        optimizer=megatron_optimizer,
    )
