"""Properties of the algebra and of the tables, on plain tensors, under random layouts."""

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_bridge.export_plan import ExportPlan
from megatron_bridge.layout import Coords, Layout
from megatron_bridge.mapping import (
    engine_views,
    hf_shapes,
    layer_name,
    rank_views,
    template_shapes,
)
from megatron_bridge.models import ARCHITECTURES, describe
from megatron_bridge.models.architecture import Spec
from megatron_bridge.models.mtp import without_mtp
from megatron_bridge.table_check import check
from megatron_bridge.views import copy_in, tiling_errors

FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY = settings(FAST, max_examples=400)
DENSE = ["Qwen3", "Qwen2", "Llama", "Mistral"]
MOE = ["Qwen3Moe", "Qwen2Moe", "Mixtral", "Glm4Moe", "DeepseekV3"]
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
}


@st.composite
def sigmoid_experts(draw, num_layers, tp):
    """Fields of GLM-4.5 and DeepSeek-V3: shared experts, first layers dense."""
    return {
        "n_shared_experts": draw(st.sampled_from([1, 2])),
        "moe_intermediate_size": max(4, tp) * draw(st.sampled_from([1, 3])),
        "first_k_dense_replace": draw(st.integers(0, num_layers - 1)),
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": draw(st.sampled_from([0, 1, 2])),
    }


@st.composite
def cases(draw):
    """(config.json, layout, spec, vocabulary multiple): all divides, nothing else is tame.

    Every architecture, tied and not, biases, layers dense or with experts, multi-token prediction,
    stages even and not.
    """
    tp = draw(st.sampled_from([1, 2, 4, 8]))
    pp = draw(st.sampled_from([1, 2, 4]))
    vpp = draw(st.sampled_from([1, 2])) if pp > 1 else 1
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4])) * (8 if tp > kv_heads else 2)
    config = {
        "architectures": [f"{draw(st.sampled_from(DENSE))}ForCausalLM"],
        "sliding_window": None,
        "num_hidden_layers": pp * vpp * draw(st.sampled_from([1, 2])),
        "hidden_size": 8,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([8, 16])),
        "intermediate_size": 8 * draw(st.sampled_from([1, 3])),
        "vocab_size": draw(st.integers(3, 70)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    sizes = {"tp": tp, "pp": pp, "vpp": vpp, "dp": draw(st.sampled_from([1, 2, 4]))}
    if draw(st.booleans()):
        family = draw(st.sampled_from(MOE))
        config |= {"architectures": [f"{family}ForCausalLM"], "num_experts_per_tok": 2}
        experts = {"Glm4Moe": "n_routed_experts", "DeepseekV3": "n_routed_experts"}
        config[experts.get(family, "num_experts")] = draw(st.sampled_from([4, 8]))
        if family != "Mixtral":
            config["moe_intermediate_size"] = draw(st.sampled_from([4, 12]))
        if family.startswith("Qwen"):
            config["decoder_sparse_step"] = draw(st.sampled_from([1, 2])) if pp > 1 else 1
        if family == "Qwen2Moe":
            config["shared_expert_intermediate_size"] = 8 * draw(st.sampled_from([1, 3]))
        if family in experts:
            config |= draw(sigmoid_experts(config["num_hidden_layers"], tp))
        if family == "Glm4Moe":
            config |= {"attention_bias": True, "use_qk_norm": draw(st.booleans())}
        if family == "DeepseekV3":
            config |= LATENT | {"num_key_value_heads": heads, "tie_word_embeddings": False}
        if pp > 1 and config.get("num_nextn_predict_layers"):
            config["tie_word_embeddings"] = False
        parts = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)]
        stage = tp * sizes["dp"]
        fitting = [(ep, etp) for ep, etp in parts if stage % (ep * etp) == 0]
        sizes["ep"], sizes["etp"] = draw(st.sampled_from(fitting))
    if pp > 1 and draw(st.booleans()):
        config["num_hidden_layers"] += vpp
        sizes[draw(st.sampled_from(["first", "last"])) + "_stage_layers"] = config[
            "num_hidden_layers"
        ] - vpp * (pp - 1)
    layout = Layout(**sizes)
    return config, layout, draw(st.sampled_from(list(Spec))), draw(st.sampled_from([1, 4, 128]))


def random_weights(config):
    """Every weight a random bit pattern, so that any misplaced element shows."""
    return {
        name: torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
        for name, shape in hf_shapes(config).items()
    }


def load_all(config, layout, spec, multiple, weights):
    """What every rank holds after loading; padding starts as rubbish."""
    ranks = []
    for rank in range(layout.world_size):
        held = {}
        views = rank_views(config, layout, layout.coords(rank), spec, multiple)
        for key, view in views.items():
            held[key] = torch.full(view.shape, 123456789, dtype=torch.int32)
            copy_in(view, lambda box: weights[box.name][box.source], held[key])
        ranks.append((views, held))
    return ranks


@FAST
@given(cases())
def test_load_then_export_gives_back_every_bit(case):
    round_trip(case)


@pytest.mark.nightly  # 400 random layouts take half a minute
@MANY
@given(cases())
def test_load_then_export_gives_back_every_bit_at_night(case):
    round_trip(case)


def round_trip(case):
    """Every rank loads its boxes; the export's pieces put together must be what was loaded."""
    config, layout, spec, multiple = case
    assert check(config, layout, multiple) == []
    weights = random_weights(config)
    ranks = load_all(config, layout, spec, multiple, weights)
    plan = ExportPlan(
        hf_config=config,
        layout=layout,
        spec=spec,
        dtype=torch.float32,
        vocab_pad_multiple=multiple,
        bucket_bytes=2000,
    )
    exported = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    filled = dict.fromkeys(weights, 0)
    layers = plan.model.shape.all_layers
    runs = [
        {layer_name(name, number) for name in run}
        for run in plan.model.architecture.together
        for number in layers
    ]
    for bucket in plan.buckets:
        assert len(bucket.parts) == 1 or bucket.size_bytes <= 2000
        names = {tensor.name for tensor in bucket.tensors}
        for run in runs:
            assert names.isdisjoint(run) or names.issuperset(run)
        for tensor in bucket.tensors:
            for piece in tensor.pieces:
                box = piece.box
                source = ranks[piece.rank][1][piece.chunk, piece.parameter][box.local]
                exported[box.name][box.source].copy_(source)
                filled[box.name] += box.numel
                assert piece.rank % layout.stage_size < max(layout.tp, layout.ep * layout.etp)
    assert [entry[0] for entry in plan.entries] == list(weights)
    for name, tensor in weights.items():
        assert torch.equal(exported[name], tensor)
        assert filled[name] == tensor.numel()  # no byte travels twice


@FAST
@given(cases())
def test_no_tensor_is_left_behind_with_a_neighbour_that_never_comes(case):
    config, layout, spec, multiple = case
    plan = ExportPlan(
        hf_config=config,
        layout=layout,
        spec=spec,
        dtype=torch.float32,
        vocab_pad_multiple=multiple,
        bucket_bytes=2000,
    )
    last = list(template_shapes(plan.model, plan.model.shape.layer_sections(0)))[-1]
    wrong = replace(plan.model.architecture, together=((last, "absent"),))
    vars(plan)["model"] = replace(plan.model, architecture=wrong)
    with pytest.raises(AssertionError, match=re.escape(last)):
        _ = plan.buckets


@FAST
@given(cases())
def test_every_rank_holds_its_boxes_and_zeros_beside_them(case):
    config, layout, spec, multiple = case
    weights = random_weights(config)
    for views, held in load_all(config, layout, spec, multiple, weights):
        for key, view in views.items():
            rest = held[key].clone()
            for box in view.boxes:
                assert torch.equal(held[key][box.local], weights[box.name][box.source])
                rest[box.local] = 0
            assert not rest.any()


def test_random_cases_name_every_architecture():
    assert {f"{family}ForCausalLM" for family in DENSE + MOE} == ARCHITECTURES.keys()


@FAST
@given(cases(), st.sampled_from([1, 2, 4]))
def test_engine_ranks_hold_every_weight(case, engine_tp):
    config = case[0]
    kv_heads = config["num_key_value_heads"]
    if config["num_attention_heads"] % engine_tp or (kv_heads % engine_tp and engine_tp % kv_heads):
        return
    model = describe(config)
    if model.architecture.engine_limit(model.shape):
        with pytest.raises(ValueError, match=r"SGLang cannot serve this \w+ForCausalLM"):
            engine_views(config, engine_tp, 0, "cuda")
        return
    boxes: dict = {}
    for rank in range(engine_tp):
        for view in engine_views(config, engine_tp, rank, "cuda").values():
            for box in view.boxes:
                boxes.setdefault(box.name, []).append((box.start, box.size))
    wanted = hf_shapes(without_mtp(config))  # an engine's model has no such layers
    assert boxes.keys() == wanted.keys()
    for name, shape in wanted.items():
        assert tiling_errors(name, shape, boxes[name]) == []


def test_layers_of_uneven_stages_go_round_as_megatrons_do():
    layout = Layout(pp=4, vpp=2, first_stage_layers=2, last_stage_layers=4)
    chunks = [list(layout.chunk_layers(14, pp, chunk)) for chunk in (0, 1) for pp in range(4)]
    assert chunks == [[0], [1, 2], [3, 4], [5, 6], [7], [8, 9], [10, 11], [12, 13]]
    with pytest.raises(ValueError, match=r"15 layers .* parallel\.first_stage_layers=2"):
        layout.chunk_layers(15, 0, 0)


def test_tiling_check_sees_holes_overlaps_and_boxes_outside():
    whole = [((0, 0), (2, 3)), ((2, 0), (2, 3))]
    assert tiling_errors("w", (4, 3), whole) == []
    assert tiling_errors("w", (4, 3), [*whole, whole[0]]) == []  # a replica
    assert "6 of 12 elements" in tiling_errors("w", (4, 3), whole[:1])[0]
    assert "overlap" in tiling_errors("w", (4, 3), [*whole, ((1, 1), (2, 1))])[0]
    assert "outside" in tiling_errors("w", (4, 3), [((2, 0), (3, 3))])[0]


def test_ranks_are_numbered_as_megatron_numbers_them():
    """Megatron's default order tp-cp-ep-dp-pp; expert ranks count etp, ep, then data parallel."""
    layout = Layout(tp=2, cp=2, dp=4, pp=2, ep=4, etp=2)
    assert layout.coords(0) == Coords()
    assert layout.coords(1) == Coords(tp=1, etp=1)
    assert layout.coords(2) == Coords(cp=1, ep=1)
    assert layout.coords(4) == Coords(dp=1, ep=2)
    assert layout.coords(8) == Coords(dp=2, ep=0)
    assert layout.coords(16 + 3) == Coords(pp=1, tp=1, cp=1, ep=1, etp=1)
    for rank in range(layout.world_size):
        c = layout.coords(rank)
        assert layout.rank(tp=c.tp, cp=c.cp, dp=c.dp, pp=c.pp) == rank
