"""`drivetrain-convert`: both ways bit for bit, killed in the middle, and what it refuses.

Checkpoints that real ranks save and load are converted in test_megatron.py and tests/e2e.
"""

import json
import multiprocessing
import os
import shutil
import signal

import pytest
import torch
from bridge_models import create_patterned_model
from safetensors.torch import load_file, save_file

from megatron_bridge import conversion, models
from megatron_bridge.convert import main
from megatron_bridge.export_plan import ExportPlan
from megatron_bridge.hf_checkpoint import HfCheckpoint
from megatron_bridge.hf_writer import HfWriter
from megatron_bridge.models.llama import QKV
from megatron_bridge.torch_dist import TorchDistCheckpoint, is_torch_dist
from megatron_bridge.torch_dist_writer import TorchDistWriter

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
BIAS = "e_score_correction_bias"


def make(path, name="qwen3_tied", dtype=torch.bfloat16, **sizes):
    """A model with the small files that one has; returns its tensors."""
    tensors = create_patterned_model(name, path, num_hidden_layers=2, **sizes)
    tensors = {n: t if BIAS in n else t.to(dtype) for n, t in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "tokenizer.json").write_text('{"a": 1}')
    (path / "generation_config.json").write_text('{"temperature": 0.6}')
    return tensors


def read(path):
    """Every tensor of a directory."""
    found = {}
    for file in path.glob("*.safetensors"):
        found |= load_file(file)
    return found


def same(found, wanted):
    """Bit for bit, names and types too."""
    return found.keys() == wanted.keys() and all(
        found[n].dtype == wanted[n].dtype and found[n].equal(wanted[n]) for n in wanted
    )


def convert(*arguments):
    """The exit status of a command line."""
    return main([str(each) for each in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tied Qwen3 in bf16, and its torch_dist checkpoint; read only."""
    root = tmp_path_factory.mktemp("convert")
    make(root / "hf")
    assert convert("to-megatron", root / "hf", root / "megatron") == 0
    return root


@pytest.mark.parametrize("name", ["qwen3_tied", "qwen3_moe", "deepseek_v3"])
def test_there_and_back_is_bit_exact(tmp_path, capsys, name):
    hf, out = tmp_path / "hf", tmp_path / "out"
    tensors = make(hf, name)
    assert convert("to-megatron", hf, tmp_path / "megatron", "--max-shard-size", "50KB") == 0
    assert len(list((tmp_path / "megatron").glob("*.distcp"))) > 2
    out.mkdir()  # an empty directory is nobody's
    to_hf = ("to-hf", tmp_path / "megatron", out, "--like", hf)
    assert convert(*to_hf, "--max-shard-size", "50KB") == 0
    assert same(read(out), tensors)
    assert (HEAD in read(out)) == (name != "qwen3_tied")
    with HfCheckpoint(out) as checkpoint:
        assert checkpoint.tensors.keys() == tensors.keys()
    for file in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (out / file).read_bytes() == (hf / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron", "out"]
    assert convert(*to_hf) == 2
    assert f"{out} exists already" in capsys.readouterr().err


def test_a_tied_checkpoint_that_repeats_its_embedding_loses_the_copy_only(tmp_path, model, capsys):
    tensors = read(model / "hf")
    shutil.copytree(model / "hf", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    save_file({**tensors, HEAD: tensors[EMBEDDING].clone()}, file)
    assert convert("to-megatron", tmp_path / "hf", tmp_path / "megatron") == 0
    to_hf = ("to-hf", tmp_path / "megatron", tmp_path / "out", "--like", tmp_path / "hf")
    assert convert(*to_hf) == 0
    assert same(read(tmp_path / "out"), tensors)
    save_file({**tensors, HEAD: tensors[EMBEDDING] + 1}, file)
    assert convert("to-megatron", tmp_path / "hf", tmp_path / "other") == 2
    assert "lm_head.weight differs from model.embed_tokens.weight" in capsys.readouterr().err


def killed(monkeypatch, owner, method, calls, *arguments):
    """Run a command in a process that is killed in the given call of a method."""
    right, left = getattr(owner, method), iter(range(calls))

    def dies(*args, **kwargs):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, dies)
        process = multiprocessing.get_context("fork").Process(target=convert, args=arguments)
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_to_hf_goes_on_where_it_was_killed(tmp_path, model, monkeypatch, capsys):
    out, tensors = tmp_path / "out", read(model / "hf")
    command = ("to-hf", model / "megatron", out, "--like", model / "hf", "--max-shard-size", "30KB")
    killed(monkeypatch, HfWriter, "add", 10, *command)
    assert not out.exists()
    (partial,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match="holds neither"):
        HfCheckpoint(partial)
    written = {path: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert 0 < len(written) < 10
    killed(monkeypatch, HfWriter, "add", 3, *command)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    kept = len(list(partial.glob("*.safetensors")))
    assert convert(*command) == 0
    assert f"{kept} files kept of a conversion that was cut off" in capsys.readouterr().out
    assert same(read(out), tensors)
    assert list(tmp_path.iterdir()) == [out]


def test_what_was_left_of_another_checkpoint_is_not_kept(tmp_path, model, monkeypatch):
    out = tmp_path / "out"
    options = ("--like", model / "hf", "--max-shard-size", "30KB")
    killed(monkeypatch, HfWriter, "add", 10, "to-hf", model / "megatron", out, *options)
    tensors = {name: tensor + 1 for name, tensor in read(model / "hf").items()}
    shutil.copytree(model / "hf", tmp_path / "hf")
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert convert("to-megatron", tmp_path / "hf", tmp_path / "megatron") == 0
    assert convert("to-hf", tmp_path / "megatron", out, *options) == 0
    assert same(read(out), tensors)


def test_to_megatron_that_was_killed_leaves_no_checkpoint(tmp_path, model, monkeypatch):
    out = tmp_path / "out"
    command = ("to-megatron", model / "hf", out)
    killed(monkeypatch, TorchDistWriter, "resolve_data", 10, *command)
    assert not out.exists()
    (partial,) = tmp_path.iterdir()
    assert not is_torch_dist(partial)
    assert convert(*command) == 0
    assert TorchDistCheckpoint(out).errors(json.loads((out / "config.json").read_text())) == []
    assert list(tmp_path.iterdir()) == [out]


def test_two_do_not_write_the_same_directory(tmp_path, model, capsys):
    with conversion._alone(tmp_path / ".out.partial"):
        assert convert("to-megatron", model / "hf", tmp_path / "out") == 2
    assert "is being written by another process" in capsys.readouterr().err


def drop_metadata(path):
    (path / "megatron" / ".metadata").unlink()


def garble_metadata(path):
    (path / "megatron" / ".metadata").write_bytes(b"\x80\x05no pickle")


def cut_data(path):
    file = path / "megatron" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100_000])


def drop_data(path):
    (path / "megatron" / "__0_0.distcp").unlink()


def drop_config(path):
    (path / "hf" / "config.json").unlink()


def other_base(path):
    change_config(path, rope_parameters={"rope_type": "default", "rope_theta": 7.0})


def more_layers(path):
    (path / "megatron" / "config.json").unlink()
    change_config(path, num_hidden_layers=3)


def smaller_vocabulary(path):
    (path / "megatron" / "config.json").unlink()
    change_config(path, vocab_size=90)


def other_architecture(path):
    change_config(path, architectures=["GPT2LMHeadModel"])


def nothing(path):
    pass


def change_config(path, **values):
    file = path / "hf" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


TO_HF = "to-hf megatron out --like hf"


@pytest.mark.parametrize(
    ("spoil", "command", "said"),
    [
        (drop_metadata, TO_HF, "megatron holds no .metadata: not a complete checkpoint"),
        (garble_metadata, TO_HF, "megatron/.metadata cannot be read"),
        (cut_data, TO_HF, "megatron/__0_0.distcp has "),
        (drop_data, TO_HF, "megatron/__0_0.distcp is missing"),
        (drop_config, TO_HF, "hf/config.json does not exist"),
        (other_base, TO_HF, "rotary_base = "),
        (more_layers, TO_HF, "decoder.layers.2.mlp.linear_fc1.weight_v is missing"),
        (smaller_vocabulary, TO_HF, "holds values beyond vocab_size = 90"),
        (other_architecture, TO_HF, "architecture 'GPT2LMHeadModel' is not supported"),
        (nothing, "to-hf nowhere out --like hf", "nowhere is not a directory with a checkpoint"),
        (nothing, "to-hf . out --like hf", "holds no .metadata"),
        (nothing, "to-hf megatron hf --like hf", "hf exists already; nothing is overwritten"),
        (nothing, "to-hf megatron out", "the following arguments are required: --like"),
        (nothing, f"{TO_HF} --max-shard-size 5XB", "--max-shard-size: '5XB' is no size"),
        (nothing, "to-megatron nowhere out", "nowhere is not a directory with a Hugging Face"),
        (drop_config, "to-megatron hf out", "hf/config.json does not exist"),
        (nothing, "to-megatron hf megatron", "megatron exists already"),
        (nothing, "convert hf out", "invalid choice: 'convert'"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    tmp_path, model, monkeypatch, capsys, spoil, command, said
):
    for name in ("hf", "megatron"):
        shutil.copytree(model / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    try:
        status = convert(*command.split())
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("drivetrain-convert: ") for line in lines)
    assert any(said in line for line in lines)
    assert sorted(tmp_path.rglob("*")) == before


def test_types_that_one_parameter_cannot_have_are_refused(tmp_path, model, capsys):
    tensors = read(model / "hf")
    names = [name.replace("{layer}", "1") for name in QKV]
    tensors[names[1]] = tensors[names[1]].float()
    shutil.copytree(model / "hf", tmp_path / "hf")
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert convert("to-megatron", tmp_path / "hf", tmp_path / "out") == 2
    assert f"{names[1]} F32, {names[0]} BF16" in capsys.readouterr().err
    assert convert("verify", tmp_path / "hf") == 1
    assert "linear_qkv.weight is made of ['BF16', 'F32']" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("qwen3_tied", "--tp 2 --pp 2 --cp 2"),
        ("qwen3_moe", "--tp 4 --pp 2 --ep 2 --etp 2 --first-stage-layers 1"),
        ("deepseek_v3", "--tp 2 --ep 4 --vocab-pad-multiple 128"),
    ],
)
def test_verify_takes_a_good_directory_through_every_rank(tmp_path, capsys, name, layout):
    tensors = make(tmp_path / "hf", name)
    tensors["model.norm.weight"][3] = torch.nan  # which is not equal to itself
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert convert("verify", tmp_path / "hf", *layout.split()) == 0
    said = capsys.readouterr().out
    assert f" ranks, {len(tensors)} tensors, " in said
    assert said.endswith("bit-exact\n")


def test_verify_lists_every_tensor_that_is_wrong(tmp_path, model, capsys):
    tensors = read(model / "hf")
    tensors["model.other.weight"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(3)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    shutil.copytree(model / "hf", tmp_path / "hf")
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert convert("verify", tmp_path / "hf", "--tp", "2") == 1
    said = capsys.readouterr()
    assert "model.other.weight is not one of Qwen3ForCausalLM" in said.err
    assert "model.norm.weight has shape (3,), expected (64,)" in said.err
    assert "model.layers.0.mlp.up_proj.weight is missing" in said.err
    assert said.out.endswith("3 errors\n")


def test_verify_finds_a_tensor_that_the_table_maps_twice(model, monkeypatch, capsys):
    import dataclasses

    table = models.ARCHITECTURES["Qwen3ForCausalLM"]
    rows = tuple(
        dataclasses.replace(row, tensors=(QKV[0], QKV[1], QKV[1])) if row.tensors == QKV else row
        for row in table.rows
    )
    wrong = dataclasses.replace(table, rows=rows)
    monkeypatch.setitem(models.ARCHITECTURES, "Qwen3ForCausalLM", wrong)
    assert convert("verify", model / "hf", "--tp", "2") == 1
    said = capsys.readouterr().err
    assert f"{QKV[1]} is mapped 2 times, not once" in said
    assert f"{QKV[2]} is mapped 0 times, not once" in said


def test_verify_finds_an_export_that_takes_the_wrong_rows(model, monkeypatch, capsys):
    right = ExportPlan._section_boxes

    def shifted(self, section):
        for rank, name, box in right(self, section):
            if name.endswith("linear_proj.weight") and rank == 1:
                box = box._replace(start=(box.start[0], 0))  # the columns of rank 0
            yield rank, name, box

    monkeypatch.setattr(ExportPlan, "_section_boxes", shifted)
    assert convert("verify", model / "hf", "--tp", "2", "--spec", "te") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # one a layer
    assert all("self_attn.o_proj.weight: " in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--tp 0", "--tp is 0; it must be an integer >= 1"),
        ("--tp two", "argument --tp: invalid int value: 'two'"),
        ("--tp 3", "--tp=3 does not divide num_attention_heads = 8"),
        ("--pp 3", "2 layers cannot be cut evenly over --pp=3 stages"),
        ("--ep 2", "--ep=2: Qwen3ForCausalLM has no experts"),
        ("--vpp 2", "--vpp=2 needs --pp > 1"),
        ("--dp -1", "--dp is -1; it must be an integer >= 1"),
        ("--tp 2 --ep 3 --dp 2", "--ep * --etp = 3 does not divide tp * cp * dp = 4"),
        ("--vocab-pad-multiple 0", "--vocab-pad-multiple is 0; it must be >= 1"),
        ("--spec apex", "argument --spec: invalid choice: 'apex'"),
    ],
)
def test_verify_refuses_arguments_by_name(model, capsys, arguments, said):
    try:
        status = convert("verify", model / "hf", *arguments.split())
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("drivetrain-convert: ") for line in lines)
    assert any(said in line for line in lines)
