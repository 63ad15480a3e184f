"""Multi-token prediction on disk: kept by every way there and back, or refused by name.

That its tables are right the logits tell, see `test_megatron.py`.
"""

import json

import pytest
import torch
from bridge_models import MODELS, create_patterned_model
from safetensors.torch import load_file, save_file

from megatron_bridge.convert import main
from megatron_bridge.direct_plan import DirectPlan
from megatron_bridge.export_plan import ExportPlan
from megatron_bridge.hf_checkpoint import HfCheckpoint
from megatron_bridge.layout import Layout
from megatron_bridge.mapping import hf_shapes
from megatron_bridge.models import describe
from megatron_bridge.models.architecture import Spec
from megatron_bridge.models.mtp import FIELD, mtp_copies, without_mtp
from megatron_bridge.mtp_export import mtp_source
from megatron_bridge.table_check import check

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NAMES = [name for name in MODELS if name.endswith("_mtp")]


def make(path, name="glm4_moe_mtp", *, copies=True):
    """A model with the layers, and what they repeat; returns its tensors."""
    tensors = create_patterned_model(name, path, num_hidden_layers=2)
    if copies:
        repeated = mtp_copies(describe(read_config(path)).shape)
        tensors |= {copy: tensors[original].clone() for copy, original in repeated.items()}
        write(path, tensors)
    return tensors


def read_config(path):
    return json.loads((path / "config.json").read_text())


def write(path, tensors):
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def convert(*arguments):
    """The exit status of a command line."""
    return main([str(each) for each in arguments])


def same(path, wanted):
    """Whether a directory holds these tensors, bit for bit, and no others."""
    found = load_file(path / "model.safetensors")
    return found.keys() == wanted.keys() and all(found[n].equal(wanted[n]) for n in wanted)


def of_layers(tensors, *, mtp):
    """The tensors of those layers of two-layered models, or of the rest."""
    later = ("model.layers.2.", "model.layers.3.")
    return {n: t for n, t in tensors.items() if n.startswith(later) is mtp}


@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_bit_exact(tmp_path, name, copies):
    hf, out = tmp_path / "hf", tmp_path / "out"
    tensors = make(hf, name, copies=copies)
    assert convert("to-megatron", hf, tmp_path / "megatron") == 0
    assert convert("to-hf", tmp_path / "megatron", out, "--like", hf) == 0
    assert same(out, tensors)
    assert read_config(out) == {**read_config(hf), "dtype": "float32"}


@pytest.mark.parametrize("name", NAMES)
def test_verify_takes_the_layers_through_every_rank(tmp_path, capsys, name):
    tensors = make(tmp_path / "hf", name)
    assert convert("verify", tmp_path / "hf", "--tp", "2", "--pp", "2", "--ep", "2") == 0
    once = len(tensors) - 2 * describe(read_config(tmp_path / "hf")).shape.mtp_layers
    assert f" {once} tensors, " in capsys.readouterr().out
    tensors["model.layers.2.shared_head.head.weight"][3, 4] += 1
    del tensors["model.layers.2.hnorm.weight"]
    write(tmp_path / "hf", tensors)
    assert convert("verify", tmp_path / "hf") == 1
    assert "model.layers.2.hnorm.weight is missing" in capsys.readouterr().err


def test_a_copy_that_was_changed_is_refused(tmp_path, capsys):
    tensors = make(tmp_path / "hf")
    tensors["model.layers.2.shared_head.head.weight"][-1] += 1
    write(tmp_path / "hf", tensors)
    assert convert("to-megatron", tmp_path / "hf", tmp_path / "out") == 2
    said = "model.layers.2.shared_head.head.weight differs from lm_head.weight; megatron-core"
    assert said in capsys.readouterr().err
    assert convert("verify", tmp_path / "hf", "--tp", "2") == 1
    assert said in capsys.readouterr().err


def test_a_checkpoint_without_them_goes_on_with_those_of_the_directory(tmp_path, capsys):
    """A run that built none: its embedding moved on, and with it what repeats it."""
    hf, trained = tmp_path / "hf", tmp_path / "trained"
    tensors = make(hf)
    policy = {name: tensor + 1 for name, tensor in of_layers(tensors, mtp=False).items()}
    make(trained)
    write(trained, policy)  # and config.json still counts them, as transformers leaves it
    assert convert("to-megatron", trained, tmp_path / "megatron") == 0
    assert convert("to-hf", tmp_path / "megatron", tmp_path / "out", "--like", hf) == 0
    assert f"those of {hf}, for the checkpoint has none" in capsys.readouterr().err
    wanted = policy | of_layers(tensors, mtp=True)
    for copy, original in mtp_copies(describe(read_config(hf)).shape).items():
        wanted[copy] = policy[original]
    assert same(tmp_path / "out", wanted)


def test_a_copy_that_differs_is_carried_as_it_is(tmp_path):
    hf = tmp_path / "hf"
    tensors = make(hf)
    tensors["model.layers.2.embed_tokens.weight"] += 1
    plain = tmp_path / "plain"
    make(plain)
    write(plain, of_layers(tensors, mtp=False))
    write(hf, tensors)
    assert convert("to-megatron", plain, tmp_path / "megatron") == 0
    assert convert("to-hf", tmp_path / "megatron", tmp_path / "out", "--like", hf) == 0
    assert same(tmp_path / "out", tensors)


def test_what_is_left_out_is_said(tmp_path, capsys):
    hf = tmp_path / "hf"
    tensors = make(hf)
    assert convert("to-megatron", hf, tmp_path / "with") == 0
    policy = of_layers(tensors, mtp=False)
    write(hf, policy)
    assert convert("to-megatron", hf, tmp_path / "without") == 0
    assert convert("to-hf", tmp_path / "without", tmp_path / "out", "--like", hf) == 0
    assert f"left out, for neither {tmp_path / 'without'}" in capsys.readouterr().err
    assert same(tmp_path / "out", policy)
    (hf / "config.json").write_text(json.dumps(without_mtp(read_config(hf))))
    assert convert("to-hf", tmp_path / "with", tmp_path / "plain", "--like", hf) == 0
    assert f"left out, for {FIELD} of {hf}/config.json is 0" in capsys.readouterr().err
    assert same(tmp_path / "plain", policy)


def test_fp8_takes_the_decoder_layer_and_leaves_what_is_around_it(tmp_path):
    hf = tmp_path / "hf"
    make(hf)
    assert convert("to-megatron", hf, tmp_path / "megatron") == 0
    assert convert("to-hf", tmp_path / "megatron", tmp_path / "out", "--like", hf, "--fp8") == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    own = {n: t for n, t in found.items() if n.startswith("model.layers.2.") and t.dim() == 2}
    kept = {n for n, t in own.items() if t.dtype is torch.float32 and "_scale_inv" not in n}
    around = ("eh_proj", "embed_tokens", "shared_head.head", "mlp.gate")
    assert kept == {f"model.layers.2.{name}.weight" for name in around}
    assert own["model.layers.2.mlp.experts.3.down_proj.weight"].dtype is torch.float8_e4m3fn
    config = read_config(tmp_path / "out")["quantization_config"]
    assert "model.layers.2.eh_proj" in config["modules_to_not_convert"]


def test_pushes_leave_them_out(tmp_path):
    """An engine's model has none, in buckets and shard to shard."""
    make(tmp_path, "deepseek_v3_mtp")
    config = read_config(tmp_path)
    export = ExportPlan(
        hf_config=config,
        layout=Layout(tp=2),
        spec=Spec.TORCH,
        dtype=torch.bfloat16,
        vocab_pad_multiple=8,
        bucket_bytes=50_000,
        mtp=False,
    )
    policy = hf_shapes(without_mtp(config))
    assert {name: shape for name, _, shape in export.entries} == policy
    direct = DirectPlan(export=export, engine_tp=2, num_engines=1, engine_device="cpu")
    sent = [
        each
        for turn in direct.rounds
        for r in (0, 1)
        for x in turn.sent_by(r).values()
        for each in x
    ]
    assert sent
    assert not any("mtp." in each.source.parameter for each in sent)


def test_a_tied_embedding_behind_another_stage_is_refused(tmp_path):
    make(tmp_path)
    config = {**read_config(tmp_path), "tie_word_embeddings": True}
    assert check(config, Layout(tp=2), 8) == []
    assert any("parallel.pp=2" in error for error in check(config, Layout(pp=2), 8))
    assert check(without_mtp(config), Layout(pp=2), 8) == []


def test_layers_are_read_or_left_out(tmp_path):
    tensors = make(tmp_path)
    with HfCheckpoint(tmp_path) as checkpoint:
        assert describe(checkpoint.config).transformer["mtp_num_layers"] == 1
        assert {*checkpoint.mtp_names} == of_layers(tensors, mtp=True).keys()
    with HfCheckpoint(tmp_path, mtp=False) as checkpoint:
        assert "mtp_num_layers" not in describe(checkpoint.config).transformer
    assert mtp_source("", str(tmp_path)) == tmp_path
    (tmp_path / "other").mkdir()
    assert mtp_source(str(tmp_path / "other"), str(tmp_path)) == tmp_path
