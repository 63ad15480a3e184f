"""A box of a checkpoint, read straight into the tensor that it is for."""

import pytest
import torch
from bridge_models import create_patterned_model
from safetensors.torch import save_file

from megatron_bridge.hf_checkpoint import HfCheckpoint
from megatron_bridge.views import Box

NAME = "model.layers.0.mlp.down_proj.weight"  # [64, 96]
BOXES = [
    ((0, 0), (64, 96)),  # all of it
    ((17, 0), (30, 96)),  # whole rows
    ((0, 32), (64, 32)),  # a cut through every row
    ((63, 95), (1, 1)),
]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("start", "size"), BOXES)
def test_a_box_is_read_into_its_place_and_nowhere_else(stored, wanted, start, size, tmp_path):
    tensors = create_patterned_model("qwen3_untied", tmp_path, num_hidden_layers=1)
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    box = Box(NAME, start, size, (0, 0))
    for columns in (size[1], size[1] + 3):  # the second time its rows are apart
        out = torch.full((size[0] + 2, columns), 7.0, dtype=wanted)
        with HfCheckpoint(tmp_path) as checkpoint:
            checkpoint.read_into(box, out[1:-1, : size[1]])
        assert out[1:-1, : size[1]].equal(tensors[NAME][box.source].to(wanted))
        out[1:-1, : size[1]] = 7.0
        assert (out == 7.0).all()


def test_a_vector_is_read_whole_or_in_part(tmp_path):
    tensors = create_patterned_model("qwen3_untied", tmp_path, num_hidden_layers=1)
    name = "model.norm.weight"
    out = torch.zeros(64)
    with HfCheckpoint(tmp_path) as checkpoint:
        checkpoint.read_into(Box(name, (0,), (64,), (0,)), out)
        assert out.equal(tensors[name])
        checkpoint.read_into(Box(name, (5,), (9,), (0,)), out[:9])
        assert out[:9].equal(tensors[name][5:14])
    assert out.untyped_storage().resizable()  # weights are offloaded so


def test_a_file_that_is_cut_off_while_it_is_read_is_named(tmp_path):
    create_patterned_model("qwen3_untied", tmp_path, num_hidden_layers=1)
    with HfCheckpoint(tmp_path) as checkpoint:
        info = checkpoint.tensors[NAME]
        box = Box(NAME, (0, 0), info.shape, (0, 0))
        checkpoint.read_into(box, torch.empty(info.shape))
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.truncate(info.start + 100)
        with pytest.raises(ValueError, match=f"ends before tensor {NAME} does"):
            checkpoint.read_into(box, torch.empty(info.shape))
