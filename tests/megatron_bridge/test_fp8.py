"""Block fp8: within the format's own bound, whatever the cut, and as a whole directory."""

import json

import pytest
import torch
from bridge_models import create_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_bridge.convert import main
from megatron_bridge.fp8 import BLOCK, FP8, SCALE_SUFFIX, dequantize, quantize

ROUNDING = 2.0**-4
"""Of a value with 3 bits after the leading one, rounded to nearest."""
SMALLEST = 2.0**-10
"""Half the distance of the smallest values that fp8 has, in units of the scale."""


def excess(weight, values, scales):
    """Largest error over the format's bound, of any element."""
    scale = dequantize(torch.ones_like(values), scales)
    bound = torch.maximum(weight.float().abs() * ROUNDING, scale * SMALLEST)
    return ((dequantize(values, scales) - weight.float()).abs() / bound).max().item()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([0.0, 1e-38, 1e-6, 1.0, 1e30]),
    st.integers(0, 1 << 30),
)
def test_every_element_is_within_the_formats_bound(rows, columns, dtype, size, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(rows, columns, generator=generator) ** 3 * size).to(dtype)
    values, scales = quantize(weight)
    assert values.dtype is FP8
    assert scales.shape == (-(-rows // BLOCK), -(-columns // BLOCK))
    assert excess(weight, values, scales) <= 1 + 1e-5
    if size >= 1e-6:
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = values[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
                assert block.float().abs().max() == 448.0  # all of the range is used


def test_the_bound_is_one_that_wrong_scales_break():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    values, scales = quantize(weight)
    assert excess(weight, values, scales) > 0.9
    assert excess(weight, values, scales.flip(0, 1)) > 1.1
    assert excess(weight, values, 1.2 * scales) > 1.5


def test_strips_do_not_show():
    weight = torch.randn(BLOCK * 40 + 3, 130, generator=torch.Generator().manual_seed(0))
    values, scales = quantize(weight)
    last = quantize(weight[BLOCK * 40 :])
    assert values[BLOCK * 40 :].float().equal(last[0].float())
    assert scales[40:].equal(last[1])


def test_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.tensor([[1.0, float("inf")]]))


@pytest.fixture
def converted(tmp_path, request):
    """A model, and the directory in fp8 that is made of its Megatron checkpoint."""
    name, sizes = request.param
    hf, megatron, out = tmp_path / "hf", tmp_path / "megatron", tmp_path / "out"
    create_model(name, hf, num_hidden_layers=2, **sizes)
    assert main(["to-megatron", str(hf), str(megatron)]) == 0
    command = ["to-hf", str(megatron), str(out), "--like", str(hf), "--fp8"]
    assert main([*command, "--max-shard-size", "60KB"]) == 0
    tensors = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    return (
        load_file(hf / "model.safetensors"),
        tensors,
        json.loads((out / "config.json").read_text()),
    )


@pytest.mark.parametrize(
    "converted",
    [
        ("qwen3_tied", {"intermediate_size": 192}),  # a block and a half
        ("llama3", {"hidden_size": 128}),
        ("qwen3_moe", {"moe_intermediate_size": 192}),  # 768 over 4 ranks
        ("qwen2_moe", {}),
        ("mixtral", {}),
        ("glm4_moe", {}),
        ("deepseek_v3", {}),
    ],
    indirect=True,
)
def test_a_whole_directory_is_within_the_bound(converted):
    original, tensors, config = converted
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "fp8"
    assert quantization["weight_block_size"] == [BLOCK, BLOCK]
    scales = {name for name in tensors if name.endswith(SCALE_SUFFIX)}
    assert tensors.keys() - scales == original.keys()
    for name, weight in original.items():
        if name + SCALE_SUFFIX in scales:
            assert excess(weight, tensors[name], tensors[name + SCALE_SUFFIX]) <= 1 + 1e-5
        else:
            assert tensors[name].equal(weight)
    linear = {name for name, tensor in original.items() if tensor.dim() == 2 and ".layers." in name}
    kept = {f"{module}.weight" for module in quantization["modules_to_not_convert"]} & linear
    assert {name.removesuffix(SCALE_SUFFIX) for name in scales} == linear - kept
    assert all(name.endswith("gate.weight") for name in kept)


def test_a_cut_inside_a_block_needs_the_whole_tensor():
    """768 over 4 ranks is 192 a rank: quantised by ranks, the middle of a block has two scales."""
    weight = torch.randn(768, 128, generator=torch.Generator().manual_seed(0))
    whole = dequantize(*quantize(weight))
    parts = torch.cat([dequantize(*quantize(part)) for part in weight.chunk(4)])
    assert not whole.equal(parts)
    aligned = torch.cat([dequantize(*quantize(part)) for part in weight.chunk(3)])
    assert whole.equal(aligned)


def test_a_weight_that_is_not_finite_is_named(tmp_path, capsys):
    hf = tmp_path / "hf"
    create_model("qwen3_tied", hf, num_hidden_layers=1)
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = torch.inf
    save_file(tensors, hf / "model.safetensors")
    assert main(["to-megatron", str(hf), str(tmp_path / "megatron")]) == 0
    command = ["to-hf", str(tmp_path / "megatron"), str(tmp_path / "out"), "--like", str(hf)]
    assert main([*command, "--fp8"]) == 2
    assert "model.layers.0.mlp.up_proj.weight: it holds values" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
