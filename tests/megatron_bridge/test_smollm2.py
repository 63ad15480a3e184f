"""A real model: SmolLM2-135M there and back bit for bit, and served after a push, at night."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bridge.convert import main
from rollout.config import EngineConfig
from rollout.server.engine import EngineProcess

SCRIPT = Path(__file__).parents[2] / "scripts" / "smollm2.py"
TEXTS = (
    "The quick brown fox jumps over the lazy dog. Paris is the capital of France.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
)
LOGPROB_TOLERANCE = 1e-4
pytestmark = [
    pytest.mark.nightly,  # a download of 93 MB, and a server with a model of 135 million weights
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as scripts/smollm2.py makes it."""
    out = tmp_path_factory.mktemp("smollm2") / "hf"
    subprocess.run([sys.executable, str(SCRIPT), str(out)], check=True, timeout=400)
    return out


@pytest.fixture(scope="module")
def blank_engine(
    smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineProcess]:
    """A server of the same architecture with every weight 0.01."""
    root = tmp_path_factory.mktemp("blank")
    tensors = load_file(smollm2 / "model.safetensors")
    blank = {name: torch.full_like(tensor, 0.01) for name, tensor in tensors.items()}
    model = root / "model"
    model.mkdir()
    for file in smollm2.iterdir():
        if file.suffix != ".safetensors":
            (model / file.name).write_bytes(file.read_bytes())
    save_file(blank, model / "model.safetensors", metadata={"format": "pt"})
    process = EngineProcess(
        config=EngineConfig(device="cpu", max_total_tokens=2048, max_running_requests=4),
        model_path=str(model),
        api_key="key",
        log_path=root / "engine.log",
    )
    with process:
        yield process


def test_it_goes_there_and_back_bit_for_bit(smollm2, tmp_path, capsys):
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert main(["to-megatron", str(smollm2), str(megatron)]) == 0
    assert main(["to-hf", str(megatron), str(back), "--like", str(smollm2)]) == 0
    wanted = load_file(smollm2 / "model.safetensors")
    found = load_file(back / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(found[n].dtype is wanted[n].dtype and found[n].equal(wanted[n]) for n in wanted)
    for layout in (("--tp", "3", "--pp", "2"), ("--tp", "3", "--pp", "5", "--vpp", "3")):
        assert main(["verify", str(smollm2), *layout]) == 0
        assert "bit-exact" in capsys.readouterr().out


def engine_logprobs(engine: EngineProcess, tokens: list[int]) -> torch.Tensor:
    """Log-probability of every token but the first, [T - 1]."""
    body = {
        "input_ids": tokens,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    headers = {"Authorization": f"Bearer {engine.api_key}"}
    reply = httpx.post(
        f"{engine.url}/generate", json=body, headers=headers, timeout=300, trust_env=False
    )
    found = reply.json()["meta_info"]["input_token_logprobs"]
    assert [token for _, token, *_ in found] == tokens
    return torch.tensor([logprob for logprob, *_ in found[1:]])


def test_served_after_a_push_it_gives_transformers_logprobs(smollm2, blank_engine, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    before = [engine_logprobs(blank_engine, tokens) for tokens in prompts]
    worker = Path(__file__).with_name("push_worker.py")
    done = subprocess.run(
        [
            *(sys.executable, str(worker), str(smollm2), blank_engine.url),
            *("1", "float32", str(tmp_path), "distributed"),
        ],
        env=os.environ | {"ENGINE_KEY": blank_engine.api_key},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(f"push: {json.loads(done.stdout.splitlines()[-1])}")
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    for tokens, first in zip(prompts, before, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, :-1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        found = engine_logprobs(blank_engine, tokens)
        print(f"largest difference of {len(wanted)}: {(found - wanted).abs().max():.2e}")
        assert (found - wanted).abs().max() <= LOGPROB_TOLERANCE
        assert (first - wanted).abs().max() > 1.0  # the weights did come from the push
