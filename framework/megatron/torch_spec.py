"""A pure-torch GPT layer spec for megatron-core: no Transformer Engine, no apex, CPU or GPU.

megatron-core's own local spec needs neither, but its attention refuses packed sequences and context
parallelism, and its norm refuses sequence parallelism. This spec supplies those two modules under
the checkpoint names of the Transformer Engine spec, so checkpoints are the same for both.
"""

import contextlib
import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from framework.megatron.packing import padded_buckets, zigzag_positions


class TorchNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight knows that, under sequence parallelism, its gradient is partial."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
    ) -> None:
        if config.normalization != "RMSNorm" or config.layernorm_zero_centered_gamma:
            raise ValueError("the torch spec has RMSNorm without zero-centered gamma only")
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Read by finalize_model_grads.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010


@functools.lru_cache(maxsize=64)
def _gathered_order(cu_seqlens: tuple[int, ...], cp_size: int) -> torch.Tensor:
    """Where each global position lies in the concatenation of all context-parallel shards."""
    shards = [zigzag_positions(cu_seqlens, cp_size, rank) for rank in range(cp_size)]
    return torch.argsort(torch.tensor([p for shard in shards for p in shard]))


@functools.lru_cache(maxsize=64)
def _bucket_index(cu_seqlens: tuple[int, ...]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """For each bucket the packed positions [sequences, length], padding repeating the last token;
    and where each packed position lies in the concatenation of the flattened buckets."""
    rows, inverse, first = [], torch.empty(cu_seqlens[-1], dtype=torch.long), 0
    for length, sequences in padded_buckets(cu_seqlens):
        starts = torch.tensor([cu_seqlens[i] for i in sequences])
        sizes = torch.tensor([cu_seqlens[i + 1] - cu_seqlens[i] for i in sequences])
        offset = torch.arange(length)
        rows.append(starts[:, None] + torch.minimum(offset[None], sizes[:, None] - 1))
        real = offset[None] < sizes[:, None]
        place = first + torch.arange(len(sequences) * length).view(len(sequences), length)
        inverse[rows[-1][real]] = place[real]
        first += len(sequences) * length
    return rows, inverse


class TorchAttention(MegatronModule):
    """Causal attention by torch SDPA: `sbhd` or packed `thd`, GQA, and context parallelism.

    Drop-in for TEDotProductAttention. Packed sequences of similar length are attended as one padded
    batch. Under context parallelism every rank gathers all keys and values (whatever `cp_comm_type`
    says) and attends with the queries it holds.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        num_splits: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal or attention_type != "self":
            raise ValueError(f"causal self-attention only, not {attn_mask_type} {attention_type}")
        if config.window_size is not None or config.softmax_type != "vanilla":
            raise ValueError("the torch spec has neither window_size nor a softmax_type")
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        self.cp_group = groups.cp
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
        num_splits: int | None = None,
    ) -> torch.Tensor:
        """query [s, b, h, d] or packed [t, h, d]; key, value likewise with their own head count.

        Returns [s, b, h * d], or [t, h * d] when packed.
        """
        if attention_bias is not None:
            raise ValueError("the torch spec has no attention bias")
        cp_size = self.cp_group.size()
        if packed_seq_params is None:
            if cp_size == 1:
                out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
                return out.permute(2, 0, 1, 3).flatten(2)
            out = self._context_parallel(query, key, value, (0, query.size(0) * cp_size))
            return out.flatten(2)
        # Padding follows its sequence, so the causal mask hides it from every real token.
        padded = packed_seq_params.cu_seqlens_q_padded
        cu = tuple((padded if padded is not None else packed_seq_params.cu_seqlens_q).tolist())
        if cp_size > 1:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            return self._context_parallel(query, key, value, cu).squeeze(1).flatten(1)
        return self._packed(query, key, value, cu)

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu: tuple[int, ...]
    ) -> torch.Tensor:
        """[t, h, d] -> [t, h * d], one SDPA call per bucket of similar lengths."""
        rows, inverse = _bucket_index(cu)
        outputs = []
        for index in rows:
            index = index.to(query.device)
            batch = (x[index.flatten()].unflatten(0, index.shape) for x in (query, key, value))
            out = self._attend(*(x.transpose(1, 2) for x in batch))  # [n, h, length, d]
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs)[inverse.to(query.device)].flatten(1)

    def _context_parallel(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu: tuple[int, ...]
    ) -> torch.Tensor:
        """[s / cp, b, h, d] in zig-zag order -> the same shape; keys and values are gathered."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        order = _gathered_order(cu, size).to(key.device)
        key, value = (
            gather_from_sequence_parallel_region(x, group=self.cp_group)[order]
            for x in (key, value)
        )
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        # A chunk is a run of consecutive queries; its keys are all those from its sequence's start.
        outputs, first = [], 0
        for start, end in itertools.pairwise(cu):
            length = (end - start) // (2 * size)
            for chunk in (rank, 2 * size - 1 - rank):
                stop = start + (chunk + 1) * length
                outputs.append(
                    self._attend(
                        query[:, :, first : first + length],
                        key[:, :, start:stop],
                        value[:, :, start:stop],
                    )
                )
                first += length
        return torch.cat(outputs, dim=2).permute(2, 0, 1, 3)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[b, h, sq, d] x [b, hk, sk, d]; the queries are the last sq of the sk positions."""
        mask, skipped = None, key.size(2) - query.size(2)
        if skipped:  # torch's is_causal aligns at the top left; this is bottom right
            mask = torch.ones(query.size(2), key.size(2), dtype=torch.bool, device=query.device)
            mask = mask.tril(skipped)
        dropout = self.dropout if self.training else 0.0
        tracker: Any = tensor_parallel.get_cuda_rng_tracker()
        fork = tracker.fork
        with fork() if dropout and not self.config.sequence_parallel else contextlib.nullcontext():
            return F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=self.softmax_scale,
                enable_gqa=query.size(1) != key.size(1),
            )


class TorchSpecProvider(LocalSpecProvider):
    """megatron-core's local modules, with the two above in place of its norm and attention."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False):
        """The norm of every place."""
        return TorchNorm

    def core_attention(self):
        """The attention between query, key and value."""
        return TorchAttention


class TorchLatentAttention(MLASelfAttention):
    """megatron-core's latent attention with the gradient of the shared rotated key made whole.

    Without Transformer Engine the down-projection to the latent of keys and values is cut over the
    tensor-parallel ranks. Upstream gathers its output; the gradient that comes back to the rotated
    part is then only that of a rank's own heads. Handing upstream the part of the sequence that is
    this rank's makes it gather that, and sum on the way back. Without sequence parallelism nothing
    is changed: megatron-core trains experts under tp with it only. Can go when upstream does so.
    """

    def _qkv_down_projection(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[t, 1, h] -> the query's latent and [latent, rotated] of keys and values."""
        query, part = super()._qkv_down_projection(hidden_states)
        group = self.pg_collection.tp
        if group.size() == 1 or not self.config.sequence_parallel:
            return query, part
        whole = gather_from_tensor_model_parallel_region(part, group=group)
        return query, scatter_to_sequence_parallel_region(whole, group=group)


def _attention(config: TransformerConfig, backend: TorchSpecProvider) -> ModuleSpec:
    norm, column = backend.layer_norm(), backend.column_parallel_linear()
    if config.multi_latent_attention:
        return ModuleSpec(
            module=TorchLatentAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=MLASelfAttentionSubmodules(
                linear_q_proj=column,
                linear_q_down_proj=column,
                linear_q_up_proj=column,
                linear_kv_down_proj=column,
                linear_kv_up_proj=column,
                core_attention=backend.core_attention(),
                linear_proj=backend.row_parallel_linear(),
                q_layernorm=norm,
                kv_layernorm=norm,
            ),
        )
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norm if config.qk_layernorm else IdentityOp,
            k_layernorm=norm if config.qk_layernorm else IdentityOp,
        ),
    )


def _layer(config: TransformerConfig, num_experts: int | None) -> ModuleSpec:
    backend = TorchSpecProvider()
    norm = backend.layer_norm()
    # The checkpoint names of the TE spec, whose norms are fused into the linears.
    bias_dropout_add: Any = get_bias_dropout_add  # annotated upstream as what it returns
    if config.multi_latent_attention:
        names = {
            f"self_attention.{x}_layernorm.": f"self_attention.linear_{x}_up_proj.layer_norm_"
            for x in ("q", "kv")
        }
    else:
        names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not num_experts:
        names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_attention(config, backend),
            self_attn_bda=bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=get_mlp_module_spec_for_backend(
                backend=backend, num_experts=num_experts, moe_grouped_gemm=config.moe_grouped_gemm
            ),
            mlp_bda=bias_dropout_add,
            sharded_state_dict_keys_map=names,
        ),
    )


def torch_block_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The transformer block of this pipeline stage, dense or MoE as `config` says."""
    freq = config.moe_layer_freq
    is_moe = freq if isinstance(freq, list) else [i % freq == 0 for i in range(config.num_layers)]
    experts = config.num_moe_experts
    layers = [_layer(config, experts if experts and moe else None) for moe in is_moe]
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=layers[first : first + count], layer_norm=TorchNorm
    )
