"""The tables against the truth: real megatron-core models must give transformers' logits."""

import json
import multiprocessing
import socket
import time

import megatron_worker
import pytest
import torch
from bridge_models import MODELS, TOKENS, create_model

TOLERANCE = 2e-6
"""Largest |difference of logits| over largest |logit|, fp32."""

CASES = [
    {"name": "qwen3_tied_tp1", "model": "qwen3_tied", "layout": {}},
    {"name": "qwen3_tied_tp2", "model": "qwen3_tied", "layout": {"tp": 2}, "dst": 3},
    {
        "name": "qwen3_tied_tp2_pp2",
        "model": "qwen3_tied",
        "layout": {"tp": 2, "pp": 2},
        "save": True,
    },
    {
        "name": "qwen3_tied_tp2_pp2_vpp2",
        "model": "qwen3_tied",
        "layout": {"tp": 2, "pp": 2, "vpp": 2},
    },
    {"name": "qwen3_untied_tp4_above_kv_heads", "model": "qwen3_untied", "layout": {"tp": 4}},
    {"name": "qwen3_untied_pp4", "model": "qwen3_untied", "layout": {"pp": 4}},
    {"name": "llama_tied_tp4", "model": "llama_tied", "layout": {"tp": 4}},
    {"name": "llama_untied_rope3_tp1", "model": "llama_untied", "layout": {}},
    {
        "name": "llama_untied_rope3_tp2_pp2",
        "model": "llama_untied",
        "layout": {"tp": 2, "pp": 2},
        "dst": 2,
    },
    {"name": "moe_tp2_etp2", "model": "qwen3_moe", "layout": {"tp": 2, "etp": 2}, "dst": 1},
    {"name": "moe_tp2_etp1_ep4", "model": "qwen3_moe", "layout": {"tp": 2, "ep": 4}},
    {"name": "moe_ep2_etp2", "model": "qwen3_moe", "layout": {"tp": 2, "ep": 2, "etp": 2}},
    {"name": "moe_mixed_ep2_pp2", "model": "qwen3_moe_mixed", "layout": {"ep": 2, "pp": 2}},
    {
        "name": "moe_mixed_uneven",
        "model": "qwen3_moe_mixed",
        "layout": {"tp": 2, "pp": 2, "first_stage_layers": 1},
        "dst": 2,
    },
    {"name": "wrong_qkv", "model": "qwen3_tied", "layout": {"tp": 2}, "wrong": "qkv"},
    {"name": "wrong_gated", "model": "qwen3_tied", "layout": {"tp": 2}, "wrong": "gated"},
    {
        "name": "wrong_expert",
        "model": "qwen3_moe",
        "layout": {"tp": 2, "etp": 2},
        "wrong": "expert_gated",
    },
]
RIGHT = [case["name"] for case in CASES if "wrong" not in case]
WRONG = [case["name"] for case in CASES if "wrong" in case]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Every case's results, a dict per rank, from one group of four processes."""
    root = tmp_path_factory.mktemp("bridge")
    for name in MODELS:
        torch.save(create_model(name, root / name), root / f"{name}.logits")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=megatron_worker.work, args=(rank, port, str(root), CASES))
        for rank in range(megatron_worker.WORLD)
    ]
    for worker in workers:
        worker.start()
    try:
        deadline = time.monotonic() + 240
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
    finally:
        for worker in workers:
            worker.kill()
            worker.join(10)
    failures = [path.read_text() for path in sorted(root.glob("failed.*"))]
    assert not failures, failures[0]
    results = {
        case["name"]: [
            json.loads((root / f"{case['name']}.{rank}.json").read_text())
            for rank in range(megatron_worker.WORLD)
        ]
        for case in CASES
    }
    return root, results


@pytest.mark.parametrize("name", RIGHT)
def test_logits_are_those_of_transformers(outcome, name):
    differences = [r["difference"] for r in outcome[1][name] if "difference" in r]
    assert differences
    assert max(differences) <= TOLERANCE


@pytest.mark.parametrize("name", RIGHT + WRONG)
def test_export_gives_back_the_file_bit_for_bit(outcome, name):
    """True of the wrong rules as well: a round trip is no evidence of a right layout."""
    results = outcome[1][name]
    assert [error for result in results for error in result["errors"]] == []
    assert sum(result["exported"] for result in results) >= 38


@pytest.mark.parametrize("name", WRONG)
def test_logits_betray_a_wrong_rule_that_round_trips(outcome, name):
    assert min(r["difference"] for r in outcome[1][name] if "difference" in r) > 0.1


def test_saved_directory_gives_transformers_the_same_logits(outcome):
    from transformers import AutoModelForCausalLM

    root, _ = outcome
    model = AutoModelForCausalLM.from_pretrained(root / "saved", dtype="auto").eval()
    assert len(list((root / "saved").glob("*.safetensors"))) > 1
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, torch.load(root / "qwen3_tied.logits"))


def test_a_failing_save_frees_every_rank_and_leaves_nothing(outcome):
    results = outcome[1]["qwen3_tied_tp2_pp2"]
    assert "exists already" in results[0]["second_save"]
    assert all("RuntimeError: rank 0 cannot write" in r["second_save"] for r in results[1:])
    assert results[0]["left_over"] == []


def test_an_export_given_up_early_frees_every_rank(outcome):
    assert all(result["survived"] for result in outcome[1]["qwen3_tied_tp2_pp2"])
