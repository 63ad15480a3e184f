"""Every architecture in a real SGLang server: pushed by real megatron-core, at night.

The server starts with every weight 0.01, and each push is of other weights. After each its
checksums are those of the pushed tensors (the push compares them) and its log-probs transformers'.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
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
CASES: list[tuple[str, int, dict[str, Any]]] = [  # model, tp of the engine, other sizes
    ("glm4_moe", 1, {}),
    ("glm4_moe", 2, {}),
    ("glm4_moe_air", 1, {}),
    ("deepseek_v3", 1, {}),
    ("deepseek_v3", 2, {}),
    ("llama3", 1, {}),
    ("mistral", 1, {}),
    ("qwen2_untied", 1, USUAL_HEADS),
    ("qwen3_untied", 1, {}),
    ("qwen3_moe", 1, {}),
    ("qwen3_moe", 2, {}),
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


def start_engine(root: Path, tp: int, dtype: str) -> EngineProcess:
    """Of the blank model."""
    return EngineProcess(
        config=EngineConfig(
            device="cpu",
            tp=tp,
            dtype=dtype,
            max_total_tokens=2048,
            args={"skip_tokenizer_init": True},
        ),
        model_path=str(blank(root / "hf", root / "blank")),
        api_key="key",
        log_path=root / "engine.log",
    )


def pushes(engine: EngineProcess, root: Path) -> Iterator[tuple[str, int]]:
    """Transport and bytes of each push of root/hf, at once after it."""
    tp, dtype, log = str(engine.config.tp), engine.config.dtype, root / "worker.log"
    transports = sorted(TRANSPORTS)
    command = [sys.executable, str(WORKER), str(root / "hf"), engine.url, tp, dtype]
    with log.open("w") as errors:
        worker = subprocess.Popen(
            [*command, str(root / "scratch"), *transports],
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
                worker.stdin.write("next\n")
                worker.stdin.flush()
            line = worker.stdout.readline()
            assert line, log.read_text()[-3000:]
            yield transport, json.loads(line)["size_bytes"]
    assert worker.returncode == 0


@pytest.mark.parametrize(("name", "tp", "sizes"), CASES)
def test_pushed_weights_are_served_as_transformers_computes_them(name, tp, sizes, tmp_path):
    from transformers import AutoModelForCausalLM

    create_model(name, tmp_path / "hf", **sizes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with start_engine(tmp_path, tp, "float32") as engine, torch.no_grad():
        before = largest_difference(engine, model(TOKENS).logits)
        for transport, size in pushes(engine, tmp_path):
            difference = largest_difference(engine, model(TOKENS).logits)
            print(f"{name}, tp={tp}, {transport}: {size} bytes, {before:.2g} -> {difference:.2g}")
            assert size > 0
            assert difference < LOGPROB_TOLERANCE
            assert before > 0.01  # what it held before was something else
            grow(model)
            before = largest_difference(engine, model(TOKENS).logits)


HELD = [("glm4_moe", 1, {}), ("deepseek_v3", 2, {}), ("qwen2_moe", 1, USUAL_HEADS)]
"""The last one generates nothing on a CPU: the gate of its shared expert is a Triton kernel."""


@pytest.mark.parametrize(("name", "tp", "sizes"), HELD)
def test_an_engine_in_bfloat16_holds_what_stays_in_float32(name, tp, sizes, tmp_path):
    """Each push compares every checksum: biases of routers, and GLM's routers, are in float32."""
    create_model(name, tmp_path / "hf", **sizes)
    with start_engine(tmp_path, tp, "bfloat16") as engine:
        size_bytes = dict(pushes(engine, tmp_path))
    print(f"{name}, tp={tp}: {size_bytes}")
    assert size_bytes.keys() == TRANSPORTS.keys()
    assert all(size_bytes.values())
