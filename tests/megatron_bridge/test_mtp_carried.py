"""A run that builds no multi-token prediction layers carries on those of what it started from."""

import contextlib
import json
from functools import partial

import pytest
import torch
from bridge_models import create_patterned_model
from safetensors.torch import load_file, save_file

from framework.config import ModelConfig, RunConfig
from megatron_bridge.hf_checkpoint import HfCheckpoint
from megatron_bridge.layout import Layout
from megatron_bridge.load import checkpoint_errors
from megatron_bridge.models.mtp import FIELD
from rollout.run_dir import RunDir
from tests.forked_ranks import run_ranks

LATER = "model.layers.2."


def carry_on(root, rank):
    """Load the start model and save it, as a run of no steps would."""
    from framework.megatron.parallel import start_mesh, stop_mesh
    from framework.train import build_models, save_policy
    from megatron_bridge.export_plan import ExportPlan
    from megatron_bridge.load import detect_spec

    model = ModelConfig(hf_path=str(root / "plain"), init_from=str(root / "start"))
    config = RunConfig(mode="train_only", model=model)
    mesh = start_mesh(config.parallel, config.seed)
    policy, _ = build_models(config, mesh, None)
    plan = ExportPlan(
        hf_config=policy.hf_config,
        layout=mesh.layout,
        spec=detect_spec(policy.chunks),
        vocab_pad_multiple=model.vocab_pad_multiple,
        bucket_bytes=1 << 20,
        dtype=torch.float32,
        mtp=False,
    )
    with (root / "said").open("w") as said, contextlib.redirect_stderr(said):
        save_policy(config, RunDir(root / "run"), mesh, policy, plan)
    stop_mesh()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A start model with a layer of which the directory of config.json and tokenizer knows none."""
    root = tmp_path_factory.mktemp("carried")
    tensors = create_patterned_model("glm4_moe_mtp", root / "start", num_hidden_layers=2)
    create_patterned_model("glm4_moe_mtp", root / "plain", num_hidden_layers=2)
    config = json.loads((root / "plain" / "config.json").read_text()) | {FIELD: 0}
    (root / "plain" / "config.json").write_text(json.dumps(config))
    policy = {name: value for name, value in tensors.items() if not name.startswith(LATER)}
    save_file(policy, root / "plain" / "model.safetensors")
    run_ranks("carried", 1, partial(carry_on, root), root, 120.0)
    return root


def test_config_json_counts_the_carried_layers(root):
    with HfCheckpoint(root / "run" / "hf") as saved:
        assert saved.config[FIELD] == 1
        assert checkpoint_errors(saved, Layout(), 8) == []
    found, wanted = (load_file(root / path / "model.safetensors") for path in ("run/hf", "start"))
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)


def test_it_is_said_whose_they_are(root):
    said = (root / "said").read_text()
    assert f"multi-token prediction layers: those of {root / 'start'}, as they are" in said
    assert len(said.splitlines()) == 1
