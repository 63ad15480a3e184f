"""What the run relies on from the real server: the one that the whole session shares."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import yaml

from rollout.client import EngineClient, EngineFailure, EngineRefusal, Generation
from rollout.config import EngineConfig, SamplingConfig
from rollout.journal import list_steps, read_step
from rollout.main import main
from rollout.run_dir import RunDir
from rollout.server.arguments import check_names, command_line, server_fields
from rollout.server.engine import EngineProcess
from rollout.server.server_process import ServerError
from tests.conftest import API_KEY


def random_prompt(source: random.Random, length: int) -> list[int]:
    return [1, *(source.randrange(3, 69) for _ in range(length))]


def bits(generation: Generation) -> tuple[bytes, bytes, str]:
    return generation.token_ids.tobytes(), generation.logprobs.tobytes(), generation.finish


def test_a_sample_has_the_same_bits_in_any_company(engine):
    """Alone, among 7 and 64, with other traffic coming and going: tokens and log-probs equal."""
    source = random.Random(0)
    sampling = SamplingConfig(max_new_tokens=24)
    probes = [(random_prompt(source, n), source.randrange(2**60)) for n in (1, 9, 31, 64, 150)]

    def others(count: int) -> list[tuple[list[int], int]]:
        return [
            (random_prompt(source, source.randrange(1, 100)), source.randrange(2**60))
            for _ in range(count)
        ]

    async def main() -> None:
        async with EngineClient([engine.url], API_KEY, EngineConfig()) as client:

            async def generate(requests: list[tuple[list[int], int]]) -> list[Generation]:
                prompts, seeds = zip(*requests, strict=True)
                return await client.generate(list(prompts), sampling, list(seeds))

            alone = [bits((await generate([probe]))[0]) for probe in probes]
            for size in (7, 64):
                for probe, expected in zip(probes, alone, strict=True):
                    company = others(size - 1)
                    place = source.randrange(size)
                    traffic = asyncio.create_task(generate(others(source.randrange(1, 20))))
                    result = await generate([*company[:place], probe, *company[place:]])
                    await traffic
                    assert bits(result[place]) == expected
            together = await asyncio.gather(*(generate([probe]) for probe in probes))
            assert [bits(result[0]) for result in together] == alone

    asyncio.run(main())


def test_seeds_decide_the_samples_of_a_group(engine):
    async def main() -> None:
        async with EngineClient([engine.url], API_KEY, EngineConfig()) as client:
            sampling = SamplingConfig(max_new_tokens=8)
            group = await client.generate([[1, 4, 5]] * 8, sampling, [0, 1, 2, 3, 4, 5, 6, 0])
            assert len({bits(generation) for generation in group}) == 7
            assert bits(group[0]) == bits(group[7])
            for generation in group:
                assert 1 <= len(generation.token_ids) <= 8
                assert generation.end_token == (generation.finish == "stop")

    asyncio.run(main())


LONG = [1] * 10_000


def test_the_engine_refuses_what_it_must(engine):
    async def main() -> None:
        async with EngineClient([engine.url], "wrong key", EngineConfig()) as client:
            with pytest.raises(EngineFailure, match=r"status 401"):
                await client.generate([[1]], SamplingConfig(), [0])
        async with EngineClient([engine.url], API_KEY, EngineConfig()) as client:
            for prompts in ([LONG], [[1], LONG]):
                with pytest.raises(EngineRefusal, match=r"1000[0-9] tokens|length"):
                    await client.generate(prompts, SamplingConfig(), [0] * len(prompts))

    asyncio.run(main())
    # What everybody may read of a process must not hold the key.
    assert engine.process is not None
    server = psutil.Process(engine.process.pid)
    for process in [server, *server.children(recursive=True)]:
        assert API_KEY not in " ".join(process.cmdline())
    assert engine.log_path.stat().st_mode & 0o077 == 0


def make_run(path: Path, engine: EngineProcess, model: Path, **changes) -> RunDir:
    config = {
        "name": "test",
        "mode": "rollout_only",
        "seed": 3,
        "num_steps": 2,
        "model": {"hf_path": str(model), "init_from": "", "dtype": "float32"},
        "rollout": {
            "prompts_per_step": 4,
            "samples_per_prompt": 4,
            "sampling": {"max_new_tokens": 9},
            "engine": {"urls": [engine.url], "api_key": API_KEY, "max_retries": 1},
        },
        "data": {"task": "sort", "eval_num_prompts": 20},
        "parallel": {"dp": 2, "cp": 1},
        "batch": {"max_tokens_per_microbatch": 8192, "overlong": "refuse"},
    }
    run_dir = RunDir(path)
    run_dir.create()
    run_dir.config.write_text(yaml.safe_dump(config | changes))
    return run_dir


def run_rollout(run_dir: RunDir) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rollout.main", "--run-dir", str(run_dir.path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def journal(run_dir: RunDir) -> list[tuple[int, int, bytes]]:
    """Of all steps: mode=rollout_only runs ahead, and which group is done first is the clock's."""
    found = [sample for path in list_steps(run_dir.rollouts) for sample in read_step(path)[1]]
    return sorted(
        (s.group_id, s.index, s.tokens.tobytes() + s.rollout_logprobs.tobytes()) for s in found
    )


def test_rollout_only_twice_gives_the_same_samples(engine, tiny_model_dir, tmp_path):
    runs = [make_run(tmp_path / name, engine, tiny_model_dir) for name in ("one", "two")]
    first, second = (journal(run) for run in runs if run_rollout(run).returncode == 0)
    assert len(first) == 2 * 4 * 4
    assert first == second


def test_a_mixture_and_a_teacher_of_the_same_weights(engine, tiny_model_dir, tmp_path):
    """Three groups to one in every step; the teacher says of each token what the policy said."""
    run_dir = make_run(tmp_path, engine, tiny_model_dir)
    config = yaml.safe_load(run_dir.config.read_text())
    config["data"]["mixture"] = {
        "a": {"weight": 3},
        "b": {"weight": 1, "args": {"num_digits": 3}},
    }
    config["rollout"]["side_models"] = {"wise": {"url": engine.url, "api_key": API_KEY}}
    config["rollout"]["teacher"] = "wise"
    config["rollout"]["teacher_top_k"] = 69  # the whole vocabulary
    run_dir.config.write_text(yaml.safe_dump(config))
    result = run_rollout(run_dir)
    assert result.returncode == 0, result.stderr
    steps = [read_step(path) for path in list_steps(run_dir.rollouts)]
    assert len(steps) == 2
    for batch, samples in steps:
        assert Counter(sample.domain for sample in samples) == {"a": 3 * 4, "b": 1 * 4}
        assert batch.metrics["rollout/a/groups"] == 3 * batch.metrics["rollout/b/groups"] == 3
        for sample in samples:
            assert sample.teacher_logprobs is not None
            mask = sample.loss_mask.astype(bool)
            assert mask.any()
            told, said = sample.teacher_logprobs[mask], sample.rollout_logprobs[mask]
            np.testing.assert_allclose(told, said, rtol=0, atol=1e-4)
            assert sample.teacher_top_ids is not None
            assert sample.teacher_top_logprobs is not None
            top = np.full_like(sample.teacher_top_logprobs, np.nan)
            np.put_along_axis(top, sample.teacher_top_ids, sample.teacher_top_logprobs, axis=1)
            written = sample.tokens[sample.prompt_length :][:, None]
            (found,) = np.take_along_axis(top, written, axis=1)[mask].T
            np.testing.assert_allclose(found, said, rtol=0, atol=1e-4)
            np.testing.assert_allclose(np.exp(top).sum(1), 1, rtol=0, atol=1e-5)


def test_mode_eval_writes_one_line_that_does_not_change(engine, tiny_model_dir, tmp_path):
    # mode=eval is of version 0, and other tests have pushed later ones.
    httpx.post(
        f"{engine.url}/update_weight_version",
        json={"new_version": "0", "abort_all_requests": False},
        headers={"Authorization": f"Bearer {API_KEY}"},
        timeout=30,
    ).raise_for_status()
    rows = []
    sets = {
        "greedy": {"sampling": {"temperature": 0}},
        "short": {"sampling": {"max_new_tokens": 2}},
    }
    for name in ("one", "two"):
        run_dir = make_run(
            tmp_path / name, engine, tiny_model_dir, mode="eval", eval={"sets": sets}
        )
        for _ in range(2):  # a process that comes back finds the line there
            result = run_rollout(run_dir)
            assert result.returncode == 0, result.stderr
        (row,) = (json.loads(line) for line in run_dir.eval.read_text().splitlines())
        rows.append(row)
    first, second = rows
    assert first["num_prompts"] == 20
    assert len(first["samples"]) == 8
    assert first.pop("time_s") != second.pop("time_s")
    assert first == second
    greedy, short = first["sets"]["greedy"], first["sets"]["short"]
    assert (greedy["num_prompts"], short["num_prompts"]) == (20, 20)
    assert 1 <= short["response_length_mean"] <= 2 < greedy["response_length_mean"] <= 9


@pytest.mark.parametrize(
    ("changes", "status", "reason"),
    [
        ({"data": {"task": "sorting"}}, 2, "data.task=sorting"),
        ({"data": {"reward": "nosuch"}}, 2, "data.reward=nosuch"),
        ({"data": {"tusk": "sort"}}, 2, "data.tusk"),
        ({"seed": "many"}, 2, "seed: Value 'many'"),
        ({"mode": "dance"}, 2, "mode='dance'"),
        ({"rollout": {"engine": {"urls": ["http://127.0.0.1:9"], "max_retries": 1}}}, 1, "Connect"),
        ({"rollout": {"engine": {"start_timeout_s": 0.2}}}, 1, "no address of engine_0"),
        (
            {
                "rollout": {"engine": {"start_timeout_s": 0.2}},
                "eval": {"sets": {"odd": {"task": "sort", "args": {"digits": 3}}}},
            },
            2,
            "data.args={'digits': 3} of data.task=sort",
        ),
    ],
)
def test_a_rollout_process_that_cannot_work_says_why(
    engine, tiny_model_dir, tmp_path, monkeypatch, capsys, changes, status, reason
):
    run_dir = make_run(tmp_path, engine, tiny_model_dir, **changes)
    monkeypatch.setattr(sys, "argv", ["drivetrain-rollout", "--run-dir", str(run_dir.path)])
    with pytest.raises(SystemExit) as end:
        main()
    # sys.exit(text) prints the text and exits with 1.
    text = capsys.readouterr().err if end.value.code == 2 else str(end.value.code)
    assert (2 if end.value.code == 2 else 1) == status
    assert text.startswith("drivetrain-rollout: ")
    assert reason in text
    assert text.strip().count("\n") == 0


def test_sigterm_ends_a_serving_rollout_process(engine, tiny_model_dir, tmp_path):
    run_dir = make_run(tmp_path, engine, tiny_model_dir, mode="train")
    command = [sys.executable, "-m", "rollout.main", "--run-dir", str(run_dir.path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        url = run_dir.wait_address("rollout", timeout_s=60)
        headers = {"Authorization": f"Bearer {run_dir.token()}"}
        assert httpx.get(f"{url}/health", headers=headers, trust_env=False).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=15) == 0
        assert run_dir.read_address("rollout") is None
    finally:
        process.kill()


STAND_IN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("a server that says", sys.argv[1:], flush=True)
if "{end}": sys.exit(3)
time.sleep(600)
"""


@pytest.mark.parametrize(("end", "reason"), [("dies", "status 3"), ("", "within 1 s")])
def test_a_server_that_does_not_come_up(tiny_model_dir, tmp_path, monkeypatch, end, reason):
    """A stand-in for SGLang's launch module: the bound and the clearing up are what is tested."""
    (tmp_path / "stand_in.py").write_text(STAND_IN.replace("{end}", end))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("rollout.server.engine._LAUNCH", "stand_in")
    process = EngineProcess(
        config=EngineConfig(device="cpu", start_timeout_s=1.0),
        model_path=str(tiny_model_dir),
        api_key="",
        log_path=tmp_path / "log",
    )
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(ServerError, match=reason) as error:
        process.start()
    assert "a server that says" in str(error.value)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _sleepers(tmp_path):
        time.sleep(0.05)
    assert not _sleepers(tmp_path)
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_a_foreign_server_on_the_port_is_not_taken_for_ours(
    engine, tiny_model_dir, tmp_path, monkeypatch
):
    """The shared server holds the port; our stand-in never listens, so nothing is ready."""
    (tmp_path / "stand_in.py").write_text(STAND_IN.replace("{end}", ""))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("rollout.server.engine._LAUNCH", "stand_in")
    monkeypatch.setattr("rollout.server.server_process.free_port", lambda host: engine.port)
    process = EngineProcess(
        config=EngineConfig(device="cpu", start_timeout_s=1.0),
        model_path=str(tiny_model_dir),
        api_key="",
        log_path=tmp_path / "log",
    )
    with pytest.raises(ServerError, match=r"within 1 s"):
        process.start()


def test_float32_engines_on_a_gpu_multiply_in_float32(tiny_model_dir, tmp_path, monkeypatch):
    """TF32 is what Triton takes without it: the gate saw log-probs 8e-3 apart on an H100."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")  # whoever sets one has their way

    def variables(**fields):
        config = EngineConfig(device="cuda", **fields)
        model = str(tiny_model_dir)
        process = EngineProcess(
            config=config, model_path=model, api_key="", log_path=tmp_path / "log"
        )
        return process.environment()

    assert variables(dtype="float32")["TRITON_F32_DEFAULT"] == "ieee"
    assert variables(dtype="float32")["NVIDIA_TF32_OVERRIDE"] == "1"
    assert "TRITON_F32_DEFAULT" not in variables(dtype="bfloat16")


def _sleepers(path: Path) -> list[int]:
    found = []
    for process in psutil.process_iter(["environ", "status"]):
        environment = process.info["environ"] or {}
        if environment.get("PYTHONPATH") == str(path) and process.pid != os.getpid():
            found.append(process.pid)
    return found


def test_server_arguments_are_checked_against_the_installed_version():
    assert len(server_fields()) > 300
    assert server_fields()["tp_size"] == "--tp-size"
    assert server_fields()["sampling_backend"] == "--sampling-backend"  # its parser's own
    assert "config" not in server_fields()
    assert check_names({"schedule_policy": "lpm", "enable_metrics": True}) == []
    (line,) = check_names({"schedule_polici": "lpm"})
    assert "rollout.engine.args.schedule_polici" in line
    assert "did you mean schedule_policy" in line
    (line,) = check_names({"tp_size": 2})
    assert "use rollout.engine.tp instead" in line
    arguments = {"enable_metrics": True, "disable_radix_cache": False, "log_level": None}
    arguments |= {"tp_size": 2, "watchdog_timeout": 5.5}
    expected = ["--enable-metrics", "--tp-size", "2", "--watchdog-timeout", "5.5"]
    assert command_line(arguments) == expected
    with pytest.raises(ValueError, match=r"no config.json"):
        EngineProcess(config=EngineConfig(), model_path="/nowhere", api_key="", log_path=Path("x"))
