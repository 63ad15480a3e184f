"""Bytes a token that the forward pass keeps for the backward pass, layer by layer.

Counted as in Korthikanti et al. (arXiv 2205.05198), for what is built here: attention that keeps no
score matrix, gated feed-forward, no dropout, packed sequences. Tensors that sequence parallelism
shards are divided by tp only with it. The torch spec, without fused kernels, keeps more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from framework.config import RunConfig
from megatron_bridge.models import describe
from megatron_bridge.models.architecture import ModelShape

ROUTER_BYTES = 12
"""Logits, scores and gates of an expert, in fp32."""
Parts = dict[str, float]
"""What -> bytes a token of the micro-batch on this rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitBytes:
    """A token's share, in bytes, of layers that go through the backward pass as one."""

    kept: float
    """From the forward pass until the unit's backward pass."""
    again: float
    """Made once more while the unit is computed backward (recomputation)."""
    passing: float
    """Gradients within one of its layers, on top, while it is computed backward."""


class Activations:
    """Counts the layers of one configured model."""

    def __init__(self, config: RunConfig, values: Mapping[str, Any], *, torch_spec: bool) -> None:
        parallel = config.parallel
        described = describe(values)
        self.shape: ModelShape = described.shape
        self.qk_norm = bool(described.transformer.get("qk_layernorm"))
        self.top_k = values.get("num_experts_per_tok", 0)
        self.memory, self.torch_spec = config.memory, torch_spec
        self.width = 4 if config.model.dtype == "float32" else 2
        self.tp, self.etp = parallel.tp, parallel.etp
        self.shards = parallel.tp if parallel.sequence_parallel else 1

    def units(self, chunk: Sequence[int]) -> list[UnitBytes]:
        """The layers of a model chunk, with the recomputation that `memory` asks for."""
        if self.memory.recompute != "full":
            return [self.layer(number) for number in chunk]
        size = self.memory.recompute_layers
        if self.memory.recompute_method == "block":
            recomputed = [self.unit([number]) for number in chunk[:size]]
            return [*recomputed, *(self.layer(number) for number in chunk[size:])]
        return [self.unit(chunk[start : start + size]) for start in range(0, len(chunk), size)]

    def unit(self, numbers: Sequence[int]) -> UnitBytes:
        """Layers of which only the input of the first is kept."""
        layers = [self.layer(number) for number in numbers]
        return UnitBytes(
            kept=self.shape.hidden_size * self.width / self.shards,
            again=sum(each.kept for each in layers),
            passing=max(each.passing for each in layers),
        )

    def layer(self, number: int) -> UnitBytes:
        """Layer `number` as a unit of its own, in which at most parts are recomputed."""
        moe = number in self.shape.moe_layers
        attention, norm = self.attention(), self.norm()
        rest = self.experts() if moe else self.dense()
        whole = sum(attention.values()) + norm + sum(rest.values())
        freed = 0.0
        if self.memory.recompute == "selective":
            freed = self.freed(moe, attention, rest)
        return UnitBytes(kept=whole - freed, again=freed, passing=self.passing(moe))

    def norm(self) -> float:
        """Input and output of a norm, and without a fused kernel what lies between them."""
        return (3 if self.torch_spec else 2) * self.shape.hidden_size * self.width / self.shards

    def attention(self) -> Parts:
        """The attention half of a layer, its norm included."""
        shape, width, tp = self.shape, self.width, self.tp
        parts: Parts = {"input and its norm": self.norm()}
        query = shape.num_heads * shape.head_dim
        if shape.latent is not None:
            latent = shape.latent
            key, value = query, shape.num_heads * latent.value_dim
            down = latent.q_rank + latent.kv_rank + latent.rope_dim
            parts["latents and their norms"] = 2 * down * width / self.shards
        else:
            key = value = shape.num_kv_heads * shape.head_dim
        parts["query, key, value"] = (query + key + value) * width / tp
        before = query + key + value
        if self.torch_spec:  # rotation keeps nothing; norms of query and key keep both sides
            before = before + 2 * query + key if self.qk_norm and shape.latent is None else 0
        parts["projections before rotation"] = before * width / tp
        out = shape.num_heads * (shape.latent.value_dim if shape.latent else shape.head_dim)
        parts["output and row sums"] = (out * width + 4 * shape.num_heads) / tp
        if self.torch_spec:  # attends in padded buckets, and its output is gathered from them
            parts["output in its bucket"] = out * width / tp
        return parts

    def dense(self) -> Parts:
        """A feed-forward: both projections and their product; unfused also its two factors."""
        copies = 5 if self.torch_spec else 3
        return {"feed-forward": copies * self.shape.ffn_size * self.width / self.tp}

    def experts(self) -> Parts:
        """Routed experts, tokens spread evenly over them, and the shared expert."""
        shape, copies = self.shape, 5 if self.torch_spec else 3
        routed = shape.hidden_size * self.etp + copies * shape.expert_ffn_size
        parts: Parts = {
            "router": shape.num_experts * ROUTER_BYTES / self.shards,
            "tokens of experts": self.top_k * routed * self.width / self.shards,
        }
        if shape.shared_ffn_size:
            parts["shared expert"] = copies * shape.shared_ffn_size * self.width / self.tp
        return parts

    def passing(self, moe: bool) -> float:
        """Gradients of the widest tensors of a layer."""
        shape = self.shape
        if moe:
            wide = self.top_k * (2 * shape.hidden_size + 3 * shape.expert_ffn_size) / self.shards
        else:
            wide = 3 * shape.ffn_size / self.tp + 2 * shape.hidden_size / self.shards
        return wide * self.width

    def freed(self, moe: bool, attention: Parts, rest: Parts) -> float:
        """What selective recomputation does not keep."""
        modules, freed = set(self.memory.recompute_modules), 0.0
        if ("moe" if moe else "mlp") in modules:
            freed += sum(rest.values())
        elif moe:
            if "shared_experts" in modules:
                freed += rest.get("shared expert", 0.0)
            if "moe_act" in modules:
                freed += self.top_k * self.shape.expert_ffn_size * self.width / self.shards
        if "layernorm" in modules:
            freed += 2 * self.shape.hidden_size * self.width / self.shards
        if "mla_up_proj" in modules:
            freed += attention["query, key, value"]
        return freed
