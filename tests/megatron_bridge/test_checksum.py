"""Checksums against SGLang's own, recorded from real SGLang 0.5.23 servers.

checksums_*.json hold what /weights_checker answered when a server had loaded the patterned model
(CPU, --tp 1 and 2, one layer): they pin names, layout, padding, type and hash. The checksums of GPU
tensors come from SGLang's Triton kernel `gpu_tensor_hash`, run by Triton's interpreter.
"""

import copy
import json
from pathlib import Path

import httpx
import pytest
import torch
from bridge_models import create_patterned_model
from safetensors.torch import load_file

from megatron_bridge.checksum import ExpectedChecksums
from megatron_bridge.engine_parameters import EngineParameters
from megatron_bridge.export import Bucket
from megatron_bridge.hf_checkpoint import read_config
from megatron_bridge.hf_writer import HfWriter
from megatron_bridge.mapping import engine_views
from megatron_bridge.tensor_hash import gpu_checksum

RECORDED = sorted(Path(__file__).parent.glob("checksums_*.json"))


def bucket_of(tensors):
    flat = torch.cat([t.flatten() for t in tensors.values()]).view(torch.uint8)
    return Bucket(
        names=list(tensors),
        dtypes=[t.dtype for t in tensors.values()],
        shapes=[tuple(t.shape) for t in tensors.values()],
        flat=flat,
        tensors=list(tensors.values()),
    )


@pytest.fixture(params=RECORDED, ids=lambda path: path.stem)
def recorded(request, tmp_path):
    """What a server answered, the weights that it had loaded, and an ExpectedChecksums for it."""
    record = json.loads(request.param.read_text())
    sizes = {"num_hidden_layers": 1, **record.get("sizes", {})}
    tensors = create_patterned_model(record["model"], tmp_path, **sizes)
    dtype = getattr(torch, record["dtype"])
    config = read_config(tmp_path)
    return record["reply"], tensors, ExpectedChecksums(config, record["engine_tp"], dtype, "cpu")


def test_equal_weights_equal_sglangs_own_checksums(recorded):
    reply, tensors, expected = recorded
    for name, tensor in tensors.items():
        expected.add(bucket_of({name: tensor}))
    assert expected.compare(reply) == []


def test_one_changed_weight_is_named(recorded):
    reply, tensors, expected = recorded
    names = {f"model.layers.0.self_attn.{key}.weight" for key in ("k_proj", "kv_a_proj_with_mqa")}
    (name,) = names & tensors.keys()
    tensors[name][-1, -1] += 1.0
    expected.add(bucket_of(tensors))
    differences = expected.compare(reply)
    assert differences
    assert all("qkv_" in line and name in line for line in differences)
    tensors[name][-1, -1] -= 1.0
    expected.reset()
    expected.add(bucket_of(tensors))
    assert expected.compare(reply) == []


def test_missing_extra_and_silent_are_named(recorded):
    reply, tensors, expected = recorded
    expected.add(bucket_of(tensors))
    broken = copy.deepcopy(reply)
    checksums = broken["ranks"][0]["checksums"]
    checksums["extra.weight"] = checksums.pop("model.norm.weight")
    text = "\n".join(expected.compare(broken))
    assert "model.norm.weight is missing" in text
    assert "extra.weight is not expected" in text
    assert "no checksums" in expected.compare({"success": False, "message": "busy"})[0]
    assert expected.compare({"success": True, "ranks": []})
    assert expected.compare({"success": True, "ranks": reply["ranks"][1:]})
    assert expected.compare({"success": True, "ranks": [{"checksums": {}}]})


def test_an_incomplete_or_foreign_push_is_refused(recorded):
    reply, tensors, expected = recorded
    first = next(iter(tensors))
    expected.add(bucket_of({first: tensors[first]}))
    with pytest.raises(ValueError, match="never added"):
        expected.compare(reply)
    with pytest.raises(ValueError, match=f"{first} was pushed twice"):
        expected.add(bucket_of({first: tensors[first]}))
    with pytest.raises(ValueError, match=r"other\.weight is not one of"):
        expected.add(bucket_of({"other.weight": tensors[first]}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape"):
        expected.add(bucket_of({"model.norm.weight": torch.zeros(3)}))


@pytest.mark.parametrize(
    ("numel", "dtype", "checksum"),
    [
        (1, torch.float32, "3bfbe10db02c7397"),
        (3, torch.bfloat16, "d3bbe2294db3e10b"),
        (8192, torch.float32, "fb4e4986d1e3c130"),
        (8193, torch.bfloat16, "f58e9cf3d8e323b7"),
        (20000, torch.float32, "c2836a7bfd927f97"),
    ],
)
def test_gpu_checksum_equals_sglangs_triton_kernel(numel, dtype, checksum):
    assert gpu_checksum((torch.arange(numel) % 1009).to(dtype) / 8 - 3) == checksum


def test_a_running_engine_agrees_after_an_update(engine, tiny_model_dir, tmp_path):
    """The shared server takes new weights from disk; then its checksums are ours, but for one."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(tiny_model_dir / "model.safetensors").items()
    }
    out = tmp_path / "version_1"
    writer = HfWriter(
        out, [(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], tiny_model_dir
    )
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    headers = {"Authorization": f"Bearer {engine.api_key}"}
    with httpx.Client(base_url=engine.url, headers=headers, timeout=60, trust_env=False) as client:
        body = {"model_path": str(out), "abort_all_requests": False}
        assert client.post("/update_weights_from_disk", json=body).json()["success"]
        reply = client.post("/weights_checker", json={"action": "checksum"}).json()
    expected = ExpectedChecksums(read_config(out), 1, torch.float32, "cpu")
    expected.add(bucket_of(tensors))
    assert expected.compare(reply) == []
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] += 1e-6
    expected.reset()
    expected.add(bucket_of(tensors))
    differences = expected.compare(reply)
    assert len(differences) == 1
    assert "model.layers.1.mlp.gate_up_proj.weight differs" in differences[0]


def test_engine_tp_that_sglang_cannot_serve_is_refused(tmp_path):
    create_patterned_model("qwen3_tied", tmp_path, num_hidden_layers=1)
    config = read_config(tmp_path)
    with pytest.raises(ValueError, match=r"rollout\.engine\.tp=4"):
        engine_views(config, 4, 0, "cpu")  # 2 KV heads
    assert engine_views(config, 4, 0, "cuda")
    with pytest.raises(ValueError, match=r"rollout\.engine\.tp=3"):
        engine_views(config, 3, 0, "cuda")


def test_an_engine_rank_of_padding_alone_is_expected_to_hold_zeros(tmp_path):
    """SGLang pads a shared expert 32 wide to 64 for two ranks on a CPU: the second has nothing."""
    tensors = create_patterned_model("glm4_moe", tmp_path, num_hidden_layers=2)
    config = read_config(tmp_path)
    name = "model.layers.1.mlp.shared_experts.down_proj.weight"
    view = engine_views(config, 2, 1, "cpu")[name]
    assert not view.boxes
    parameters = EngineParameters(config, 2, torch.bfloat16, "cpu")
    for _ in range(2):
        parameters.reset()
        found = [
            (each.name, content)
            for key, tensor in tensors.items()
            for each, content in parameters.add(bucket_of({key: tensor}))
            if 1 in each.ranks
        ]
        assert len(found) == len(engine_views(config, 2, 1, "cpu"))
        (content,) = [content for key, content in found if key == name]
        assert content.equal(torch.zeros(view.shape, dtype=torch.bfloat16))
