"""The FLOPs formula against megatron-core's own, read from the installed package's source."""

import ast
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from framework.flops import forward_flops, training_flops
from megatron_bridge.models.score_head import score_config

DENSE = {
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151_936,
}
MOE = {
    **DENSE,
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DEEPSEEK = {
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18_432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "vocab_size": 129_280,
}


def megatron_flops(hf, layer_pattern, lengths):
    """megatron's count for packed sequences; its module needs more than this machine may have."""
    core = find_spec("megatron.core")
    assert core is not None
    assert core.origin is not None
    path = Path(core.origin).parents[1] / "training" / "training.py"
    if not path.is_file():
        pytest.skip("this megatron-core comes without megatron.training")
    (function,) = (
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "num_floating_point_operations"
    )
    names = {
        "is_hybrid_model": lambda args: False,
        "is_linear_attention_variant": lambda variant: False,
    }
    exec(compile(ast.Module([function], []), str(path), "exec"), names)
    latent = "kv_lora_rank" in hf
    shared = hf.get("n_shared_experts", 0) * hf.get("moe_intermediate_size", 0)
    args = SimpleNamespace(
        group_query_attention=not latent,
        num_query_groups=hf["num_key_value_heads"],
        num_attention_heads=hf["num_attention_heads"],
        kv_channels=hf.get("head_dim"),
        attention_output_gate=False,
        multi_latent_attention=latent,
        q_lora_rank=hf.get("q_lora_rank"),
        kv_lora_rank=hf.get("kv_lora_rank"),
        qk_head_dim=hf.get("qk_nope_head_dim"),
        qk_pos_emb_head_dim=hf.get("qk_rope_head_dim"),
        v_head_dim=hf.get("v_head_dim"),
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_experts=hf.get("num_experts", hf.get("n_routed_experts")),
        moe_layer_freq=layer_pattern,
        moe_router_topk=hf.get("num_experts_per_tok"),
        moe_ffn_hidden_size=hf.get("moe_intermediate_size"),
        moe_latent_size=None,
        moe_shared_expert_intermediate_size=shared or None,
        mtp_num_layers=None,
        swiglu=True,
        experimental_attention_variant=None,
        padded_vocab_size=hf["vocab_size"],
        seq_length=max(lengths),
    )
    return names["num_floating_point_operations"](
        args, len(lengths), sum(length**2 for length in lengths), sum(lengths)
    )


@pytest.mark.parametrize(
    ("hf", "pattern"),
    [
        (DENSE, None),
        (MOE, [1] * 48),
        ({**MOE, "mlp_only_layers": [0, 7]}, [layer not in (0, 7) for layer in range(48)]),
        ({**MOE, "decoder_sparse_step": 2}, [0, 1] * 24),
        (DEEPSEEK, [0] * 3 + [1] * 58),
    ],
    ids=["dense", "moe", "some dense layers", "every other layer", "latent attention"],
)
def test_formula_agrees_with_megatron(hf, pattern):
    lengths = [1, 517, 4096, 32_768]
    cost = training_flops(hf)
    assert sum(map(cost, lengths)) == megatron_flops(hf, pattern, lengths)


def test_frozen_weights_have_no_gradient():
    """Two of three passes through them; attention scores as ever."""
    whole, adapters = training_flops(DENSE), training_flops(DENSE, frozen=True)
    assert adapters.per_token * 3 == whole.per_token * 2
    assert adapters.per_token_squared == whole.per_token_squared


def test_a_mixture_counts_its_active_experts():
    """About 6 operations a token and active parameter: 3.3 billion of 30 (arXiv 2505.09388)."""
    assert training_flops(MOE).per_token / 6 == pytest.approx(3.04e9, rel=0.01)
    assert training_flops({**MOE, "num_experts": 512}) == training_flops(MOE)
    assert training_flops(MOE, 152_064).per_token > training_flops(MOE).per_token


@pytest.mark.parametrize("hf", [DENSE, MOE, DEEPSEEK])
def test_a_pass_without_a_gradient_is_a_third_and_passes_add_up(hf):
    """A step with a reference policy costs four passes of the forward kind."""
    training, forward = training_flops(hf), forward_flops(hf)
    assert training(100) == 3 * forward(100)
    assert (training + forward)(100) == 4 * forward(100)


def test_a_critic_has_one_output():
    hf = {**DENSE, "architectures": ["Qwen3ForCausalLM"]}
    of_outputs = training_flops(hf)(7) - training_flops(score_config(hf))(7)
    assert of_outputs == 7 * 6 * DENSE["hidden_size"] * (DENSE["vocab_size"] - 1)
