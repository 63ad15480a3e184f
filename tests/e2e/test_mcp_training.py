"""data=mcp from end to end: a policy that learned the format by stage=sft calls the tools of an MCP
server of ours, is trained on what came of it, stops, and goes on.

nightly: four runs, two of them with engines. Seen: 70 calls answered in 96 samples.
"""

import asyncio
import json
import random
import string
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import drivetrain, largest_difference, metrics, weights

from framework import tiny_model
from framework.config import TinyModelConfig
from rollout.config import DataConfig
from rollout.data import PromptStream
from rollout.environments.arithmetic import evaluate
from rollout.journal import list_steps, read_step
from rollout.tokens import Chat
from rollout.tools import CALL, read_call
from rollout.types import Sample, Status

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1200)]  # trainings, engines: minutes
ROOT = Path(__file__).parents[2]
SERVER = ROOT / "tests" / "rollout" / "mcp_server.py"
NUM_STEPS = 3


def question(rng: random.Random) -> tuple[str, int]:
    """A sum that the policy need not find itself."""
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return f"{a}+{b}", a + b


def write_questions(path: Path, seed: int, count: int) -> None:
    rng = random.Random(seed)
    texts = dict(question(rng) for _ in range(count))
    lines = (json.dumps({"question": f"{q}?", "answer": a}) for q, a in texts.items())
    path.write_text("".join(f"{line}\n" for line in lines))


def write_demonstrations(path: Path, data: DataConfig, count: int) -> None:
    """Conversations as they are had with the server: a call, its result, the answer."""
    (environment,) = PromptStream(data, 0, "train").environments(0, 1)
    system, _ = asyncio.run(environment.initial_messages())
    rng, lines = random.Random(1), []
    for _ in range(count):
        text, result = question(rng)
        call = json.dumps({"name": "calculate", "arguments": {"expression": text}})
        turns = [
            ("user", f"{text}?"),
            ("assistant", f"<tool_call>{call}</tool_call>"),
            ("tool", str(result)),
            ("assistant", str(result)),
        ]
        messages = [system, *({"role": role, "content": content} for role, content in turns)]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")


def count_calls(chat: Chat, samples: list[Sample]) -> int:
    """Calls that were answered in what was trained on; what the server said is there, as it is, and
    not trained on."""
    answered = 0
    for sample in samples:
        response = sample.tokens[sample.prompt_length :]
        others = np.flatnonzero(sample.loss_mask == 0)
        if not len(others):
            continue
        said, told = chat.text(response[: others[0]]), chat.text(response[others])
        try:
            calls = [read_call(call, ["calculate"])[1] for call in CALL.findall(said)]
            results = [str(evaluate(arguments["expression"])) for arguments in calls]
        except (ValueError, KeyError, TypeError):
            assert "error: " in told, said  # the policy is told what was wrong
            continue
        assert told == "".join(results), said
        answered += len(results)
    return answered


def overrides(prefix: str, args: dict) -> list[str]:
    """As the command line takes them."""
    found = []
    for name, value in args.items():
        if isinstance(value, dict):
            found += overrides(f"{prefix}.{name}", value)
        else:
            shown = f"[{','.join(value)}]" if isinstance(value, list) else value
            found.append(f"{prefix}.{name}={shown}")
    return found


def test_a_policy_is_trained_on_its_calls_of_a_servers_tools(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_model, "CHARACTERS", string.printable)  # it has to write JSON
    model = tmp_path / "model"
    tiny_model.create_tiny_model(TinyModelConfig(), model)
    write_questions(tmp_path / "questions.jsonl", 0, 400)
    args = {
        "task": "jsonl",
        "args": {"path": str(tmp_path / "questions.jsonl")},
        "command": [sys.executable, str(SERVER)],
        "variables": {"PYTHONPATH": str(ROOT)},
        "tools": ["calculate"],
        "max_calls": 1,
    }
    write_demonstrations(tmp_path / "talk.jsonl", DataConfig(task="mcp", args=args), 4000)
    same = [f"model.hf_path={model}", "tracker.tensorboard=false", "tracker.report=false"]
    sft = ["stage=sft", "num_steps=120", "optimizer.lr=3e-3", "warm_start.batch_size=32"]
    drivetrain(*same, *sft, f"data.path={tmp_path / 'talk.jsonl'}", f"run_dir={tmp_path / 'sft'}")
    rl = [
        *("data=mcp", "data.reward=environment", f"model.init_from={tmp_path / 'sft' / 'hf'}"),
        *overrides("data.args", args),
        *("rollout.prompts_per_step=4", "rollout.samples_per_prompt=8"),
        *("rollout.sampling.max_new_tokens=120", "optimizer.lr=1e-3", "parallel.dp=2"),
        *("eval.at_start=false", "eval.at_end=false", "algorithm.entropy_coef=0.01"),
        *("checkpoint.every_steps=1", "checkpoint.resume=auto", f"run_dir={tmp_path / 'rl'}"),
    ]
    drivetrain(*same, *rl, f"num_steps={NUM_STEPS - 1}")
    before = weights(tmp_path / "rl")
    drivetrain(*same, *rl, f"num_steps={NUM_STEPS}")
    assert largest_difference(before, weights(tmp_path / "rl")) > 0
    rows = [row for row in metrics(tmp_path / "rl") if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    steps = [read_step(path) for path in list_steps(tmp_path / "rl" / "rollouts")]
    assert [batch.step for batch, _ in steps] == [0, 1, 2]
    samples = [sample for _, mine in steps for sample in mine]
    assert len(samples) == NUM_STEPS * 32
    failed = [sample.metadata for sample in samples if sample.status is Status.FAILED]
    assert not failed, failed[:3]
    calls = count_calls(Chat.load(str(model)), samples)
    print(f"{calls} calls answered in {len(samples)} samples")
    assert calls > len(samples) / 4
    replay = [
        "mode=train_only",
        f"replay_dir={tmp_path / 'rl' / 'rollouts'}",
        f"num_steps={NUM_STEPS}",
    ]
    again = [each for each in rl if "run_dir" not in each and "resume" not in each]
    drivetrain(*same, *again, *replay, f"num_steps={NUM_STEPS}", f"run_dir={tmp_path / 'again'}")
    assert largest_difference(weights(tmp_path / "rl"), weights(tmp_path / "again")) == 0.0
