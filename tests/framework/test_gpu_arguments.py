"""What only a GPU would run is at least called as the installed versions want to be called."""

import ast
import dataclasses
import importlib.util
import inspect
import itertools
from pathlib import Path

import pytest

import framework.megatron  # noqa: F401 - prepares megatron-core for this machine

SGLANG = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])


def fields_of(source: Path, name: str) -> set[str]:
    """Annotated fields of a class and of its bases in the same file, without importing it."""
    classes = {
        node.name: node
        for node in ast.parse(source.read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    found: set[str] = set()
    wanted = [name]
    while wanted:
        node = classes.get(wanted.pop())
        if node is None:
            continue
        found |= {
            item.target.id
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        }
        wanted += [base.id for base in node.bases if isinstance(base, ast.Name)]
    assert found, f"{source} has no class {name}"
    return found


def test_machine_settings_are_fields_of_transformer_config():
    from megatron.core.transformer.transformer_config import TransformerConfig

    from framework.megatron.model import machine_settings

    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    for gpu, te, apex in itertools.product((False, True), repeat=3):
        settings = machine_settings(gpu=gpu, transformer_engine=te, apex=apex)
        assert settings.keys() <= known
        assert settings["use_cpu_initialization"] is not gpu


def test_apex_fusion_is_the_extension_megatron_imports():
    from megatron.core.tensor_parallel import layers

    from framework.megatron.model import APEX_FUSION

    assert f"import {APEX_FUSION}" in inspect.getsource(layers)


def test_transformer_engine_spec_takes_our_arguments():
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    bound = inspect.signature(get_gpt_decoder_block_spec).bind(
        object(), use_transformer_engine=True, vp_stage=0
    )
    assert bound.arguments["use_transformer_engine"] is True


def test_te_attention_takes_what_our_torch_attention_stands_in_for():
    from megatron.core.extensions import transformer_engine as te

    from framework.megatron.torch_spec import TorchAttention

    source = ast.parse(inspect.getsource(te))
    (attention,) = [
        node
        for node in ast.walk(source)
        if isinstance(node, ast.ClassDef) and node.name == "TEDotProductAttention"
    ]
    for method in ("__init__", "forward"):
        theirs = {
            argument.arg
            for node in attention.body
            if isinstance(node, ast.FunctionDef) and node.name == method
            for argument in [*node.args.args, *node.args.kwonlyargs]
        }
        ours = set(inspect.signature(getattr(TorchAttention, method)).parameters)
        assert theirs <= ours | {"self"}, (method, theirs - ours)


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        (
            "InitWeightsUpdateGroupReqInput",
            "master_address master_port rank_offset world_size group_name backend",
        ),
        (
            "UpdateWeightsFromDistributedReqInput",
            "names dtypes shapes group_name load_format flush_cache abort_all_requests "
            "weight_version",
        ),
        (
            "UpdateWeightFromDiskReqInput",
            "model_path abort_all_requests weight_version flush_cache",
        ),
        ("DestroyWeightsUpdateGroupReqInput", "group_name"),
        ("PauseGenerationReqInput", "mode"),
        ("CheckWeightsReqInput", "action"),
    ],
)
def test_requests_to_the_engine_have_the_installed_versions_fields(name, sent):
    known = fields_of(SGLANG / "srt" / "managers" / "io_struct.py", name)
    assert set(sent.split()) <= known


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_engine_arguments_are_known_to_the_installed_server(device, tiny_model_dir, tmp_path):
    from rollout.config import EngineConfig
    from rollout.server.arguments import server_fields
    from rollout.server.engine import EngineProcess

    process = EngineProcess(
        config=EngineConfig(device=device, tp=2, dtype="bfloat16"),
        model_path=str(tiny_model_dir),
        api_key="key",
        log_path=tmp_path / "log",
    )
    arguments = process.arguments(port=1)
    assert arguments.keys() <= server_fields().keys()
    # On a GPU SGLang chooses device and attention kernel by itself.
    assert ("attention_backend" in arguments) == (device == "cpu")
