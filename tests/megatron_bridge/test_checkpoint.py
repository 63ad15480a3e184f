"""Hugging Face directories: what is refused, and that writing is whole or not at all."""

import json
import shutil

import pytest
import torch
from bridge_models import create_patterned_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_bridge.hf_checkpoint import HfCheckpoint, read_config
from megatron_bridge.hf_writer import HfWriter
from megatron_bridge.layout import Layout
from megatron_bridge.load import check_checkpoint
from megatron_bridge.views import Box


@pytest.fixture
def model(tmp_path):
    """A directory with a one-layer Qwen3, and its tensors."""
    path = tmp_path / "model"
    tensors = create_patterned_model("qwen3_untied", path, num_hidden_layers=1)
    (path / "tokenizer.json").write_text("{}")
    (path / "notes.md").write_text("not part of a model")
    return path, tensors


def refused(path):
    """The message with which a directory is refused."""
    with pytest.raises(ValueError) as caught, HfCheckpoint(path) as checkpoint:
        check_checkpoint(checkpoint, Layout(tp=2), 8)
    return str(caught.value)


def entries_of(tensors):
    return [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]


def write(out, like, tensors, **options):
    writer = HfWriter(out, entries_of(tensors), like, **options)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()


def test_slices_are_read_alone(model):
    path, tensors = model
    with HfCheckpoint(path) as checkpoint:
        name = "model.layers.0.mlp.down_proj.weight"
        box = Box(name, (3, 5), (7, 11), (0, 0))
        assert torch.equal(checkpoint.read(box), tensors[name][3:10, 5:16])


def test_every_wrong_tensor_is_listed_at_once(model):
    path, tensors = model
    tensors["model.extra.weight"] = torch.zeros(2)
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = torch.zeros(3, 4)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int32)
    save_file(tensors, path / "model.safetensors")
    message = refused(path)
    assert "model.extra.weight is not one of Qwen3ForCausalLM" in message
    assert "model.norm.weight is missing" in message
    assert "lm_head.weight has shape (3, 4), expected (101, 64)" in message
    assert f"{name} has type I32" in message


def test_a_file_that_was_cut_off_is_refused(model):
    path, _ = model
    file = path / "model.safetensors"
    content = file.read_bytes()
    for length in (0, 5, 300, len(content) - 1):
        file.write_bytes(content[:length])
        message = refused(path)
        assert str(file) in message
    file.write_bytes(b"\xff" * 8 + content[8:])
    assert "cut off" in refused(path)
    file.write_bytes(content + b"x")
    assert "bytes" in refused(path)


def test_directories_that_hold_no_model_are_refused(model, tmp_path):
    path, _ = model
    assert "is not a directory" in refused(tmp_path / "nothing")
    (path / "config.json").write_text("{")
    assert "is not JSON" in refused(path)
    (path / "config.json").unlink()
    assert "config.json does not exist" in refused(path)
    shutil.copytree(path, tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    (tmp_path / "bare" / "config.json").write_text("{}")
    assert "holds neither" in refused(tmp_path / "bare")


def test_an_index_that_lies_is_refused(model, tmp_path):
    path, tensors = model
    write(tmp_path / "split", path, tensors, max_file_bytes=30_000)
    index = tmp_path / "split" / "model.safetensors.index.json"
    right = json.loads(index.read_text())
    assert len(set(right["weight_map"].values())) > 2

    def lie(changes):
        index.write_text(json.dumps({"weight_map": {**right["weight_map"], **changes}}))
        return refused(tmp_path / "split")

    assert "is in no file" in lie({"model.other.weight": right["weight_map"]["model.norm.weight"]})
    assert "is not in the directory" in lie({"model.norm.weight": "../model/model.safetensors"})
    assert "is not listed there" in lie({"model.norm.weight": "model-00001-of-00005.safetensors"})
    index.write_text(json.dumps({"weight_map": {}}))
    assert "missing or empty" in refused(tmp_path / "split")
    index.write_text(json.dumps(right))
    shutil.copy(path / "model.safetensors", tmp_path / "split")
    assert "holds both" in refused(tmp_path / "split")


def test_a_tied_checkpoint_may_repeat_its_embedding_but_not_change_it(tmp_path):
    from megatron_bridge.load import check_copies
    from megatron_bridge.mapping import rank_views
    from megatron_bridge.models.architecture import Spec

    tensors = create_patterned_model("qwen3_tied", tmp_path, num_hidden_layers=1)
    layout = Layout(tp=2)
    for changed in (False, True):
        head = tensors["model.embed_tokens.weight"].clone()
        head[-1] += changed
        save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors")
        with HfCheckpoint(tmp_path) as checkpoint:
            model = check_checkpoint(checkpoint, layout, 8)
            config = checkpoint.config
            first, last = (
                rank_views(config, layout, layout.coords(r), Spec.TORCH, 8) for r in (0, 1)
            )
            check_copies(checkpoint, model, first)
            if changed:
                with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
                    check_copies(checkpoint, model, last)
            else:
                check_copies(checkpoint, model, last)
    save_file({**tensors, "lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    assert "lm_head.weight has shape (2, 2)" in refused(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_file_bytes", [1, 30_000, 1 << 30])
def test_written_directory_is_what_was_added(model, tmp_path, dtype, max_file_bytes):
    path, tensors = model
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    out = tmp_path / "deep" / "out"
    write(out, path, tensors, max_file_bytes=max_file_bytes)
    found = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        found |= load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    with HfCheckpoint(out) as checkpoint:
        check_checkpoint(checkpoint, Layout(tp=2), 8)
    assert read_config(out)["dtype"] == str(dtype).removeprefix("torch.")
    assert (out / "tokenizer.json").exists()
    assert not (out / "notes.md").exists()
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_an_unfinished_directory_never_appears(model, tmp_path):
    path, tensors = model
    out = tmp_path / "out"
    name, tensor = next(iter(tensors.items()))
    killed = HfWriter(out, entries_of(tensors), path)
    killed.add(name, tensor)
    assert not out.exists()
    with pytest.raises(ValueError, match="came where"):
        killed.add("model.norm.weight", tensors["model.norm.weight"])
    with pytest.raises(ValueError, match="never came"):
        killed.finish()
    assert not out.exists()
    write(out, path, tensors)  # takes the place of what the killed one left
    assert [p.name for p in tmp_path.iterdir() if p.name != "model"] == ["out"]
    with pytest.raises(ValueError, match="exists already"):
        HfWriter(out, entries_of(tensors), path)
    again = HfWriter(tmp_path / "other", entries_of(tensors), path)
    again.abort()
    assert not list(tmp_path.glob("*other*"))
