"""What model.mtp=true refuses, by key."""

import copy
import functools
import json

import pytest
import torch
from safetensors.torch import save_file

from framework.checks import check_config
from framework.compose import compose_config
from framework.plan import estimate_sections
from framework.plan.stages import model_values
from megatron_bridge.conversion import to_megatron
from megatron_bridge.mapping import hf_shapes
from tests.megatron_bridge.mtp_models import GLM


@functools.cache
def smoke():
    """Composing takes a quarter of a second, so this is done once."""
    return compose_config(["experiment=smoke", "stage=sft"])


def make(path, *, tensors=True, **changes):
    """A directory with such layers; `tensors`: also in its files."""
    path.mkdir()
    config = {**GLM, **changes}
    (path / "config.json").write_text(json.dumps(config))
    shapes = hf_shapes(config if tensors else {**config, "num_nextn_predict_layers": 0})
    save_file({n: torch.zeros(s) for n, s in shapes.items()}, path / "model.safetensors")
    return path


def run_with(hf_dir, **changes):
    """A run on that directory, with changes by dotted key (`__` for the dot)."""
    config = copy.deepcopy(smoke())
    config.model.hf_path, config.model.mtp = str(hf_dir), True
    for key, value in changes.items():
        *sections, name = key.split("__")
        setattr(functools.reduce(getattr, sections, config), name, value)
    return config


def errors_of(hf_dir, **changes):
    """What of it is refused for model.mtp."""
    return [each for each in check_config(run_with(hf_dir, **changes)) if "mtp" in each]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__lora__rank": 4}, "model.mtp=True: not with model.lora.rank=4"),
        ({"parallel__fsdp": True}, "model.mtp=True: not with parallel.fsdp=True"),
        ({"stage": "reward_model"}, "model.mtp=True: a reward model predicts no tokens"),
        ({"stage": "preference"}, "heads would learn rejected answers of stage=preference"),
        (
            {"parallel__pp": 2, "parallel__overlap": True},
            "no gradient that parallel.overlap=True could wait for; set it to false",
        ),
        (
            {"memory__recompute": "full", "memory__recompute_method": "block"},
            "memory.recompute_method=block; must be uniform",
        ),
        (
            {"memory__recompute": "full", "memory__recompute_layers": 2},
            "needs memory.recompute_layers=1, not 2",
        ),
        ({"model__hf_path": ""}, "model.tiny has no multi-token prediction layers"),
        (
            {"model__mtp": False, "model__megatron": {"mtp_loss_scaling_factor": 0.3}},
            "model.megatron.mtp_loss_scaling_factor: there are no such layers; set model.mtp=true",
        ),
        ({"model__megatron": {"mtp_num_layers": 2}}, "set by Drivetrain from model.mtp"),
    ],
)
def test_what_cannot_work_is_named(tmp_path, changes, said):
    assert any(said in each for each in errors_of(make(tmp_path / "hf"), **changes))


def test_a_model_with_the_layers_is_taken_and_one_without_is_not(tmp_path):
    good = make(tmp_path / "good")
    assert errors_of(good) == []
    assert errors_of(good, model__megatron={"mtp_loss_scaling_factor": 0.3}) == []
    none = make(tmp_path / "none", num_nextn_predict_layers=0)
    assert any("(num_nextn_predict_layers of its config.json is 0)" in e for e in errors_of(none))
    dropped = make(tmp_path / "dropped", tensors=False)
    assert any(f"the files of model.hf_path={dropped} hold no" in e for e in errors_of(dropped))
    later = errors_of(good, model__init_from=str(dropped))
    assert any(f"the files of model.init_from={dropped} hold no" in e for e in later)
    tied = make(tmp_path / "tied", tie_word_embeddings=True)
    assert any("under parallel.pp=2; must be 1" in e for e in errors_of(tied, parallel__pp=2))


def test_overlap_is_taken_where_all_is_one_stage(tmp_path):
    assert errors_of(make(tmp_path / "hf"), parallel__dp=2, parallel__overlap=True) == []


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The directory, Megatron checkpoints of it with and without such layers, and those of none."""
    root = tmp_path_factory.mktemp("checkpoints")
    hf, bare = make(root / "hf"), make(root / "bare", tensors=False)
    for path in (hf, bare):
        to_megatron(path, root / f"{path.name}_megatron", max_file_bytes=1 << 30)
    return hf, root / "hf_megatron", root / "bare_megatron", bare


def test_what_a_run_starts_from_must_hold_them_and_the_directory_need_not(checkpoints):
    hf, held, none, bare = checkpoints
    assert errors_of(hf, model__init_from=str(held)) == []
    assert errors_of(bare, model__init_from=str(held)) == []
    (told,) = errors_of(hf, model__init_from=str(none))
    assert f"the files of model.init_from={none} hold no tensor" in told


def test_a_reference_is_built_with_them(checkpoints):
    hf, held, none, bare = checkpoints
    changes = {"stage": "rl", "algorithm__kl_coef": 0.1}
    for path in (none, bare):
        (told,) = errors_of(hf, algorithm__reference=str(path), **changes)
        assert f"the files of algorithm.reference={path} hold no tensor" in told
        assert errors_of(hf, algorithm__reference=str(path), stage="rl") == []  # not read
    assert errors_of(hf, algorithm__reference=str(held), **changes) == []


def test_heads_that_a_run_would_lose_are_not_lost(checkpoints):
    hf, held, none, _ = checkpoints
    plain = {"model__mtp": False}
    (told,) = errors_of(hf, model__init_from=str(held), **plain)
    assert "set model.mtp=true or convert it first with drivetrain-convert to-hf" in told
    assert errors_of(hf, model__init_from=str(none), **plain) == []
    assert errors_of(hf, model__init_from=str(hf), **plain) == []
    assert errors_of(hf, model__init_from=str(held), stage="reward_model", **plain) == []


def test_a_plan_counts_them_where_they_are_built(tmp_path):
    hf_dir = make(tmp_path / "hf")
    built, left = (model_values(run_with(hf_dir, model__mtp=mtp)) for mtp in (True, False))
    assert hf_shapes(built).keys() - hf_shapes(left).keys() >= {"model.layers.4.eh_proj.weight"}
    told = [
        estimate_sections(run_with(hf_dir, stage="rl", model__mtp=mtp)) for mtp in (True, False)
    ]
    held, fewer = ([x for x in lines if "parameters in all" in x] for lines in told)
    assert held != fewer
    pushed, same = ([x for x in lines if "push" in x] for lines in told)
    assert pushed == same != []
