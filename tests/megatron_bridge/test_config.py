"""config.json: what megatron-core would compute differently, or not at all, is refused."""

import pytest
from bridge_models import LLAMA3_ROPE, MODELS, SIZES

from megatron_bridge.export_plan import ExportPlan
from megatron_bridge.layout import Layout, padded_vocab_size
from megatron_bridge.models import describe
from megatron_bridge.models.architecture import Spec
from megatron_bridge.table_check import check


def config(family="Qwen3", **changes):
    """The config.json that transformers writes for a tiny model, with changes."""
    import transformers

    name = next(name for name, (each, _) in MODELS.items() if each == family)
    made = getattr(transformers, f"{family}Config")(**SIZES, **MODELS[name][1]).to_dict()
    made["architectures"] = [f"{family}ForCausalLM"]
    return {key: value for key, value in {**made, **changes}.items() if value != "absent"}


REFUSED = {
    "architecture": ({"architectures": ["Gemma3ForCausalLM"]}, "Gemma3ForCausalLM"),
    "no architecture": ({"architectures": None}, "architectures is None"),
    "two architectures": ({"architectures": ["a", "b"]}, "architectures"),
    "bias": ({"attention_bias": True}, "attention_bias"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "remote code": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    "unknown": ({"logit_softcap": 30.0}, "logit_softcap"),
    "kv heads": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "zero layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "text": ({"hidden_size": "64"}, "hidden_size"),
    "no vocabulary": ({"vocab_size": "absent"}, "vocab_size is missing"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
    "old linear": (
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "linear",
    ),
    "partial rotary": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    "two bases": ({"rope_theta": 5.0}, "rope_theta"),
    "rope constant": (
        {"rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": 4096}},
        "original_max_position_embeddings",
    ),
    "rope field": ({"rope_parameters": {"rope_theta": 1e4, "warp": 2}}, "warp"),
}


@pytest.mark.parametrize("family", ["Qwen3", "Llama"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_named(family, case):
    changes, named = REFUSED[case]
    with pytest.raises(ValueError, match=named):
        describe(config(family, **changes))


def test_sliding_windows_are_refused():
    with pytest.raises(ValueError, match="use_sliding_window"):
        describe(config(use_sliding_window=True))
    with pytest.raises(ValueError, match="sliding_attention"):
        describe(config(layer_types=["full_attention", "sliding_attention"]))
    with pytest.raises(ValueError, match="sliding_window"):
        describe(config("Llama", sliding_window=128))
    describe(config(sliding_window=128, max_window_layers=2))  # means nothing without the flag


def test_windows_of_the_mistrals_are_refused():
    with pytest.raises(ValueError, match="sliding_window is 4096"):
        describe(config("Mistral", sliding_window=4096))
    with pytest.raises(ValueError, match="sliding_window is missing, which means 4096"):
        describe(config("Mistral", sliding_window="absent"))
    with pytest.raises(ValueError, match="sliding_window is 4096"):
        describe(config("Mixtral", sliding_window=4096))


def test_what_the_families_do_not_compute_is_refused():
    for family, changes, named in (
        ("Mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("Qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("Qwen2Moe", {"qkv_bias": False}, "qkv_bias"),
        ("Qwen2Moe", {"shared_expert_intermediate_size": "absent"}, "shared_expert_intermediate"),
    ):
        with pytest.raises(ValueError, match=named):
            describe(config(family, **changes))
    assert describe(config("Mixtral", rms_norm_eps="absent")).transformer["layernorm_epsilon"] == (
        1e-5  # the others' is 1e-6
    )


def test_experts_are_read_from_both_names_and_every_mistake_is_named():
    hub = config("Qwen3Moe", num_local_experts="absent", num_experts=4)
    assert describe(hub) == describe(config("Qwen3Moe"))
    description = describe(config("Qwen3Moe", mlp_only_layers=[0], decoder_sparse_step=2))
    assert description.shape.moe_layers == {1, 3}
    assert description.transformer["moe_layer_freq"] == [0, 1, 0, 1]
    assert description.transformer["moe_router_pre_softmax"] is False  # norm_topk_prob
    for changes, named in (
        ({"num_experts": 8}, "disagree"),
        ({"num_local_experts": "absent"}, "num_experts is missing"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, "no layer has experts"),
        ({"mlp_only_layers": 3}, "mlp_only_layers is 3"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size"),
    ):
        with pytest.raises(ValueError, match=named):
            describe(config("Qwen3Moe", **changes))


def test_layouts_of_experts_that_do_not_fit_are_named():
    moe = config("Qwen3Moe")
    assert check(moe, Layout(tp=2, dp=2, ep=2, etp=2), 8) == []
    assert "parallel.ep=8" in check(moe, Layout(dp=8, ep=8), 8)[0]
    assert "parallel.etp=64" in check(moe, Layout(dp=64, etp=64), 8)[0]
    assert "no experts" in check(config(), Layout(dp=2, ep=2), 8)[0]


def test_every_offender_is_listed():
    with pytest.raises(ValueError) as caught:
        describe(config(attention_bias=True, hidden_act="gelu", made_up=1, num_hidden_layers=-1))
    for name in ("attention_bias", "hidden_act", "made_up", "num_hidden_layers"):
        assert name in str(caught.value)


def test_older_configs_mean_the_same():
    """Before transformers 5: rope_theta and rope_scaling beside each other, torch_dtype."""
    new = config("Llama", rope_parameters=LLAMA3_ROPE)
    scaling = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    old = config("Llama", rope_parameters="absent", rope_theta=5e5, rope_scaling=scaling)
    assert describe(new) == describe(old)
    assert describe(new).gpt["rotary_base"] == 5e5
    bare = config("Llama", rope_parameters="absent", head_dim="absent", num_key_value_heads=None)
    assert describe(bare).shape.head_dim == 8  # hidden_size / heads
    assert describe(bare).shape.num_kv_heads == 8
    assert describe(bare).gpt["rotary_base"] == 10000.0
    with pytest.raises(ValueError, match="head_dim is missing"):
        describe(config("Qwen3", head_dim="absent"))


def test_dropout_is_zero_whatever_the_config_says():
    transformer = describe(config(attention_dropout=0.1)).transformer
    assert transformer["attention_dropout"] == transformer["hidden_dropout"] == 0.0


def test_layouts_that_do_not_fit_are_refused_with_every_reason():
    assert check(config(), Layout(tp=2, pp=2, vpp=2), 8) == []
    text = "\n".join(check(config(), Layout(tp=3, pp=3), 8))
    assert "parallel.tp=3" in text
    assert "parallel.pp=3" in text
    assert "cannot be cut" in "\n".join(check(config(intermediate_size=97), Layout(tp=2), 8))
    for sizes, named in (
        ({"tp": 0}, "parallel.tp"),
        ({"vpp": 2}, "parallel.vpp"),
        ({"ep": 2}, "parallel.ep"),
    ):
        with pytest.raises(ValueError, match=named):
            Layout(**sizes)
    with pytest.raises(ValueError, match="vocab_pad_multiple"):
        padded_vocab_size(100, 0, 2)


def test_a_plan_for_a_layout_that_does_not_fit_is_refused():
    import torch

    fields = {
        "hf_config": config(),
        "spec": Spec.TORCH,
        "dtype": torch.float32,
        "vocab_pad_multiple": 8,
    }
    with pytest.raises(ValueError, match=r"parallel\.tp=3"):
        ExportPlan(layout=Layout(tp=3), bucket_bytes=100, **fields)
    with pytest.raises(ValueError, match="bucket size"):
        ExportPlan(layout=Layout(), bucket_bytes=0, **fields)
