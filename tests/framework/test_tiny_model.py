"""The tiny model: what is written is what the checks and the plan speak of, dense or MoE."""

import json

import pytest
from safetensors import safe_open

from framework.checks import check_config
from framework.compose import compose_config
from framework.model_shape import read_model_shape
from framework.plan.stages import model_values
from framework.tiny_model import create_tiny_model
from megatron_bridge.mapping import hf_shapes


@pytest.mark.parametrize("name", ["tiny", "tiny_moe"])
def test_it_has_the_shape_that_checks_and_plan_expect(name, tmp_path):
    config = compose_config(["experiment=smoke", f"model={name}"])
    create_tiny_model(config.model.tiny, tmp_path / "model")
    expected = model_values(config)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    # transformers writes num_experts under a name of its own.
    assert {k for k in expected if written.get(k) != expected[k]} <= {"num_experts"}
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in list(file.keys())}
    assert found == {key: tuple(shape) for key, shape in hf_shapes(written).items()}
    shape = read_model_shape(config.model)
    assert shape.architecture == written["architectures"][0]
    config.model.hf_path = str(tmp_path / "model")
    assert read_model_shape(config.model) == shape


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.tiny.experts_per_token=5", "more than model.tiny.num_experts=4"),
        ("model.tiny.tied=true", "model.tiny.tied=True: SGLang serves a Qwen3-MoE"),
        ("parallel.ep=3", "parallel.ep=3"),
    ],
)
def test_experts_that_do_not_fit_are_refused(override, said):
    errors = check_config(compose_config(["experiment=moe_sort", override]))
    assert any(said in error for error in errors), errors
