"""Every architecture in a real SGLang server: pushed by real megatron-core, at night.

The server starts with every weight 0.01, and each push is of other weights. After each its
checksums are those of the pushed tensors (the push compares them) and its log-probs transformers'.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from bridge_models import TOKENS, create_model
from push_worker import GROWTH
from safetensors.torch import load_file, save_file

from framework.weight_sync import TRANSPORTS
from rollout.config import EngineConfig
from rollout.server.engine import EngineProcess

WORKER = Path(__file__).with_name("push_worker.py")
LOGPROB_TOLERANCE = 2e-5
pytestmark = [
    pytest.mark.nightly,  # a server and a trainer for each model
    pytest.mark.timeout(900),
]
USUAL_HEADS = {"head_dim": 8}
"""All that SGLang's models of the Qwen2 families and of Mixtral take."""
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("glm4_moe", 1, {}),
    ("glm4_moe", 2, {}),
    ("glm4_moe_air", 1, {}),
    ("deepseek_v3", 1, {}),
    ("deepseek_v3", 2, {}),
    ("deepseek_v3_rope", 1, {}),
    ("llama3", 1, {}),
    ("mistral", 1, {}),
    ("qwen2_untied", 1, USUAL_HEADS),
    ("qwen2_moe", 1, USUAL_HEADS),
    ("qwen3_untied", 1, {}),
    ("qwen3_moe", 1, {}),
    ("mixtral", 1, USUAL_HEADS),
]


def blank(hf_dir: Path, out: Path) -> Path:
    """The same model with every weight 0.01."""
    out.mkdir()
    (out / "config.json").write_bytes((hf_dir / "config.json").read_bytes())
    tensors = load_file(hf_dir / "model.safetensors")
    same = {name: torch.full_like(tensor, 0.01) for name, tensor in tensors.items()}
    save_file(same, out / "model.safetensors", metadata={"format": "pt"})
    return out


def grow(model: Any) -> None:
    """What push_worker.py does to its weights between two pushes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(GROWTH)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.mul_(GROWTH)


def largest_difference(engine: EngineProcess, logits: torch.Tensor) -> float:
    """Of the log-probs of TOKENS, [2, 24], between the engine and logits [2, 24, V]."""
    body = {
        "input_ids": TOKENS.tolist(),
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    headers = {"Authorization": f"Bearer {engine.api_key}"}
    reply = httpx.post(
        f"{engine.url}/generate", json=body, headers=headers, timeout=120, trust_env=False
    )
    reply.raise_for_status()
    wanted = logits.log_softmax(-1)[:, :-1].gather(-1, TOKENS[:, 1:, None])[..., 0]
    found = torch.tensor(
        [[each[0] for each in r["meta_info"]["input_token_logprobs"][1:]] for r in reply.json()]
    )
    return (found - wanted).abs().max().item()


@pytest.mark.parametrize(("name", "tp", "sizes"), CASES, ids=lambda each: str(each))
def test_pushed_weights_are_served_as_transformers_computes_them(name, tp, sizes, tmp_path):
    from transformers import AutoModelForCausalLM

    create_model(name, tmp_path / "hf", **sizes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    process = EngineProcess(
        config=EngineConfig(
            device="cpu", tp=tp, max_total_tokens=2048, args={"skip_tokenizer_init": True}
        ),
        model_path=str(blank(tmp_path / "hf", tmp_path / "blank")),
        api_key="key",
        log_path=tmp_path / "engine.log",
    )
    transports = sorted(TRANSPORTS)
    log = tmp_path / "worker.log"
    with process as engine, log.open("w") as errors, torch.no_grad():
        assert largest_difference(engine, model(TOKENS).logits) > 0.1
        arguments = [str(tmp_path / "hf"), engine.url, str(tp), str(tmp_path / "scratch")]
        worker = subprocess.Popen(
            [sys.executable, str(WORKER), *arguments, *transports],
            env={**os.environ, "ENGINE_KEY": "key"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        with worker:
            for number, transport in enumerate(transports):
                if number:
                    grow(model)
                    assert largest_difference(engine, model(TOKENS).logits) > 0.01
                    worker.stdin.write("next\n")
                    worker.stdin.flush()
                line = worker.stdout.readline()
                assert line, log.read_text()[-3000:]
                size = json.loads(line)["size_bytes"]
                difference = largest_difference(engine, model(TOKENS).logits)
                print(f"{name}, tp={tp}, {transport}: {size} bytes, {difference:.2g}")
                assert size > 0
                assert difference < LOGPROB_TOLERANCE
        assert worker.returncode == 0
