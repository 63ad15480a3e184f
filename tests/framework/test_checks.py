"""Broken configurations through the front door: refused with 2, the key named, nothing started."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from framework.checks import check_config
from framework.compose import compose_config
from framework.config_fields import config_fields
from framework.field_rules import CHOICES, NOT_NEGATIVE, POSITIVE
from framework.main import main

ADAPTER = Path(__file__).parents[1] / "megatron_bridge" / "peft_qwen3_untied"
BROKEN: list[tuple[str, list[str], list[str]]] = [
    # what, command line, what stderr must name
    ("unknown key", ["parallel.tpp=2"], ["parallel.tpp=2", "parallel.tp?"]),
    ("unknown section", ["paralel.tp=2"], ["paralel.tp=2", "parallel.tp?"]),
    ("key without its section", ["max_staleness=1"], ["rollout.max_staleness_steps?"]),
    ("wrong type", ["parallel.tp=two"], ["parallel.tp=two", "int is wanted"]),
    ("fraction for a whole number", ["num_steps=1.5"], ["num_steps=1.5", "int is wanted"]),
    ("truth for a number", ["rollout.samples_per_prompt=true"], ["samples_per_prompt=true"]),
    ("null", ["seed=null"], ["seed=null"]),
    ("text for a list", ["rollout.sampling.stop=abc"], ["rollout.sampling.stop=abc", "list"]),
    ("unknown group", ["algoritm=grpo"], ["algoritm=grpo", "did you mean algorithm?"]),
    ("unknown option", ["algorithm=grppo"], ["algorithm=grppo", "did you mean grpo?"]),
    ("unknown experiment", ["experiment=quikstart"], ["quickstart", "smoke"]),
    ("bad syntax", ["seed"], ["'seed'", "key=value"]),
    ("unclosed bracket", ["rollout.sampling.stop=[a"], ["rollout.sampling.stop=[a", "syntax"]),
    ("a sweep", ["seed=1,2"], ["seed=1,2", "one run for each"]),
    ("a whole section", ["rollout.sampling={top_p: 1}"], ["rollout.sampling", "section"]),
    ("unknown dash option", ["--tp", "2"], ["--tp"]),
    ("config dir that is not there", ["--config-dir", "/no/such"], ["--config-dir /no/such"]),
    ("shell variable in braces", ["cluster.setup=cd ${HOME}"], ["cluster.setup", "HOME"]),
    ("no steps", ["num_steps=0"], ["num_steps=0", "greater than 0"]),
    ("negative rate", ["optimizer.lr=-1"], ["optimizer.lr=-1", "greater than 0"]),
    ("nan", ["optimizer.lr=nan"], ["optimizer.lr=nan", "finite"]),
    (
        "an evaluation by somebody else's rollout process",
        ["mode=eval", "rollout.address=http://h:1"],
        ["rollout.address=http://h:1", "mode=eval"],
    ),
    (
        "a rollout process without its engines",
        ["rollout.address=http://h:1"],
        ["rollout.address=http://h:1", "rollout.engine.urls"],
    ),
    ("router of one", ["rollout.engine.router=true"], ["policy=power_of_two", "num_engines=1"]),
    (
        "a wait longer than the other ranks'",
        ["parallel.dp=2", "rollout.batch_timeout_s=900"],
        ["parallel.timeout_s=600", "rollout.batch_timeout_s=900"],
    ),
    ("beta of one", ["optimizer.beta1=1.0"], ["optimizer.beta1=1.0", "[0, 1)"]),
    ("unknown mode", ["mode=training"], ["mode=training", "train_only"]),
    ("alpha without adapters", ["model.lora.alpha=8"], ["model.lora.alpha=8", "model.lora.rank"]),
    ("negative rank", ["model.lora.rank=-1"], ["model.lora.rank=-1", "negative"]),
    (
        "adapters on what is no linear",
        ["model.lora.rank=4", "model.lora.targets=[q_proj,lm_head]"],
        ["lm_head", "q_proj, k_proj"],
    ),
    (
        "adapters of experts",
        ["model.lora.rank=4", "model=tiny_moe"],
        ["gate_proj, up_proj, down_proj", "experts"],
    ),
    ("adapters and a critic", ["model.lora.rank=4", "algorithm=ppo"], ["model.lora.rank", "gae"]),
    (
        "adapters with another reference",
        ["model.lora.rank=4", "algorithm.kl_coef=0.1", "algorithm.reference=/m"],
        ["algorithm.reference=/m", "their base"],
    ),
    (
        "a reference that adapters would have to become",
        ["model.lora.rank=4", "algorithm.kl_coef=0.1", "algorithm.reference_refresh_steps=2"],
        ["algorithm.reference_refresh_steps=2", "must be 0"],
    ),
    (
        "adapters that are not there",
        ["model.lora.rank=4", "model.lora.init_from=/no/such"],
        ["model.lora.init_from=/no/such", "adapter_config.json"],
    ),
    (
        "adapters of another rank",
        ["model.lora.rank=4", "model.lora.alpha=3", f"model.lora.init_from={ADAPTER}"],
        ["model.lora.rank=4", "have 2"],
    ),
    (
        "adapters where nothing is trained",
        ["model.lora.rank=4", "mode=eval"],
        ["model.lora.rank=4", "mode=eval"],
    ),
    ("unknown task", ["data.task=sorting"], ["data.task=sorting", "reasoning_gym"]),
    ("unknown transport", ["weight_sync.transport=rdma"], ["transport=rdma", "distributed"]),
    (
        "a bound for nobody",
        ["gate.logprob_abs_diff_max_quantized=0.3"],
        ["gate.logprob_abs_diff_max_quantized=0.3", "weight_sync.quantization=none"],
    ),
    (
        "whole pushes of a transport that knows no others",
        ["weight_sync.full_every_pushes=3"],
        ["weight_sync.full_every_pushes=3", "distributed"],
    ),
    (
        "parameters of quantised engines",
        ["weight_sync=delta", "rollout.engine.args.quantization=fp8"],
        ["weight_sync.transport=delta", "rollout.engine.args.quantization=fp8"],
    ),
    (
        "rounded rollouts under the bound of exact ones",
        ["weight_sync.quantization=fp8_rounded"],
        ["gate.logprob_abs_diff_max_quantized=0", "weight_sync.quantization=fp8_rounded"],
    ),
    (
        "fp8 weights for engines that a run starts",
        ["weight_sync.quantization=fp8", "weight_sync=disk", "gate.enabled=false"],
        [
            "rollout.engine.urls=[]",
            "--fp8",
            "weight_sync.transport=disk",
            "weight_sync.verify=True",
        ],
    ),
    (
        "parts of parameters rounded",
        ["weight_sync.quantization=fp8_rounded", "weight_sync=direct", "gate.enabled=false"],
        ["weight_sync.quantization=fp8_rounded", "half a block"],
    ),
    (
        "engines that nobody pushes to, rounded",
        ["weight_sync.quantization=fp8_rounded", "mode=eval"],
        ["weight_sync.quantization=fp8_rounded", "mode=eval", "must be none"],
    ),
    ("heads", ["parallel.tp=3"], ["parallel.tp=3", "4 attention heads"]),
    ("feed-forward", ["parallel.tp=4", "model.tiny.ffn_size=190"], ["parallel.tp=4", "190"]),
    ("layers", ["parallel.pp=3"], ["parallel.pp=3", "2 layers"]),
    (
        "context parallel beyond the batch",
        ["parallel.cp=64", "batch.max_tokens_per_microbatch=100"],
        ["parallel.cp=64", "2 * cp = 128"],
    ),
    ("virtual stages of one stage", ["parallel.vpp=2"], ["parallel.vpp=2", "parallel.pp"]),
    ("virtual stages", ["parallel.pp=2", "parallel.vpp=2"], ["parallel.vpp=2", "1 layers"]),
    ("uneven alone", ["parallel.first_stage_layers=1"], ["first_stage_layers=1", "parallel.pp"]),
    (
        "uneven and too many",
        ["parallel.pp=2", "parallel.first_stage_layers=2", "parallel.last_stage_layers=1"],
        ["first_stage_layers=2", "last_stage_layers=1", "2 layers"],
    ),
    (
        "cut parameters with a whole optimizer",
        ["parallel.dp=2", "parallel.fsdp=true"],
        ["parallel.fsdp=True", "parallel.distributed_optimizer=true"],
    ),
    (
        "cut parameters in stages",
        ["parallel.pp=2", "parallel.fsdp=true", "parallel.distributed_optimizer=true"],
        ["parallel.fsdp=True", "parallel.pp=2"],
    ),
    (
        "cut parameters and a reference",
        ["parallel.fsdp=true", "parallel.distributed_optimizer=true", "algorithm=grpo_kl"],
        ["parallel.fsdp=True", "algorithm.kl_coef"],
    ),
    ("experts", ["parallel.ep=2"], ["parallel.ep=2", "no experts"]),
    ("cut experts", ["parallel.etp=2"], ["parallel.etp=2", "no experts"]),
    (
        "flags of virtual stages",
        ["model.megatron.batch_p2p_comm=true"],
        ["model.megatron.batch_p2p_comm=True", "parallel.vpp"],
    ),
    ("sequence parallel alone", ["parallel.sequence_parallel=true"], ["parallel.tp"]),
    ("engine heads", ["rollout.engine.tp=3"], ["rollout.engine.tp=3", "attention heads"]),
    (
        "more replicas than samples",
        ["parallel.dp=8", "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2"],
        ["parallel.dp=8"],
    ),
    (
        "more replicas than samples kept",
        ["parallel.dp=3", "rollout.keep_share=0.05", "rollout.samples_per_prompt=2"],
        ["parallel.dp=3", "(1 * rollout.samples_per_prompt = 2)"],
    ),
    (
        "spreads of single samples",
        ["algorithm=starpo_s", "rollout.samples_per_prompt=1"],
        ["rollout.samples_per_prompt=1", "rollout.keep_share=0.25 chooses groups by how"],
    ),
    ("nothing kept", ["rollout.keep_share=0"], ["rollout.keep_share=0.0"]),
    ("more than all kept", ["rollout.keep_share=1.5"], ["rollout.keep_share=1.5", "at most 1"]),
    ("no refills", ["rollout.max_refills=0"], ["rollout.max_refills=0"]),
    ("filter", ["rollout.filters=[nosuch]"], ["rollout.filters=nosuch", "dynamic_sampling"]),
    (
        "filter of one sample",
        ["rollout.filters=[dynamic_sampling]", "rollout.samples_per_prompt=1"],
        ["rollout.filters=dynamic_sampling", "rollout.samples_per_prompt=1"],
    ),
    ("punishment", ["data.overlong_share=2"], ["data.overlong_share=2.0", "at most 1"]),
    ("reward for length", ["data.overlong_penalty=-1"], ["data.overlong_penalty=-1.0"]),
    ("groups of one", ["rollout.samples_per_prompt=1"], ["rollout.samples_per_prompt=1"]),
    ("nucleus sampling", ["rollout.sampling.top_p=0.9"], ["rollout.sampling.top_p=0.9"]),
    ("top-k sampling", ["rollout.sampling.top_k=5"], ["rollout.sampling.top_k=5"]),
    ("greedy training", ["rollout.sampling.temperature=0"], ["rollout.sampling.temperature"]),
    ("stale attention state", ["weight_sync.pause_mode=in_place"], ["max_staleness_steps=0"]),
    ("response longer than a batch", ["batch.max_tokens_per_microbatch=8"], ["max_new_tokens"]),
    ("response longer than the cache", ["rollout.engine.max_total_tokens=8"], ["max_total"]),
    ("response beyond positions", ["rollout.sampling.max_new_tokens=2000"], ["1024 positions"]),
    ("no journal", ["mode=train_only"], ["replay_dir"]),
    ("journal not there", ["mode=train_only", "replay_dir=/no/such"], ["replay_dir=/no/such"]),
    ("journal for another mode", ["replay_dir=/tmp"], ["replay_dir=/tmp", "train_only"]),
    ("supervised evaluation", ["stage=sft", "mode=eval"], ["mode=eval", "stage=sft"]),
    ("model not there", ["model.hf_path=/no/such"], ["model.hf_path=/no/such"]),
    ("model not named", ["model=hf"], ["model.hf_path"]),
    ("weights not there", ["model.init_from=/no/such"], ["model.init_from=/no/such"]),
    ("SGLang argument", ["rollout.engine.args.context_lenght=8"], ["did you mean context_length?"]),
    ("SGLang argument of ours", ["rollout.engine.args.tp_size=2"], ["rollout.engine.tp"]),
    ("megatron field", ["model.megatron.recompute_granularty=full"], ["recompute_granularity?"]),
    ("megatron field of ours", ["model.megatron.num_layers=4"], ["model.megatron.num_layers=4"]),
    (
        "megatron type",
        ["model.megatron.num_microbatches_with_partial_activation_checkpoints=x"],
        ["activation_checkpoints=x", "int"],
    ),
    ("recomputation by the other name", ["model.megatron.recompute_method=block"], ["memory."]),
    (
        "module to recompute",
        ["memory.recompute=selective", "memory.recompute_modules=[attn]"],
        ["memory.recompute_modules=['attn']", "core_attn"],
    ),
    (
        "experts to recompute",
        ["memory.recompute=selective", "memory.recompute_modules=[moe]"],
        ["memory.recompute_modules=['moe']", "no experts"],
    ),
    (
        "norms to recompute",
        ["memory.recompute=selective", "memory.recompute_modules=[layernorm]"],
        ["memory.recompute_modules=['layernorm']", "transformer_engine"],
    ),
    (
        "layers to recompute",
        ["memory.recompute=full", "memory.recompute_layers=3"],
        ["memory.recompute_layers=3", "2 layers"],
    ),
    ("fp8 on a CPU", ["model.fp8=hybrid", "model.dtype=bfloat16"], ["transformer_engine"]),
    ("fp8 of fp32", ["model.fp8=hybrid"], ["model.fp8=hybrid", "model.dtype=bfloat16"]),
    ("dropout", ["model.megatron.hidden_dropout=0.1"], ["model.megatron.hidden_dropout=0.1"]),
    (
        "shared devices, asynchronous",
        ["rollout.engine.colocated=true", "rollout.max_staleness_steps=1"],
        ["rollout.max_staleness_steps=1", "rollout.engine.colocated=true", "must be 0"],
    ),
    (
        "changes of what an engine forgot",
        ["rollout.engine.colocated=true", "weight_sync=delta"],
        ["weight_sync.transport=delta", "rollout.engine.colocated=true", "tensor or disk"],
    ),
    (
        "shared devices behind a router",
        ["rollout.engine.colocated=true", "rollout.engine.router=true"],
        ["rollout.engine.router=true", "sleeping engines"],
    ),
    (
        "shared devices on a cluster, as for separate ones",
        [
            *("cluster=slurm", "rollout.engine.device=cuda", "rollout.engine.colocated=true"),
            *("dry_run=true", "cluster.num_nodes=2", "cluster.engine_nodes=1"),
        ],
        ["cluster.engine_nodes=1", "weight_sync.transport=distributed", "else disk"],
    ),
    (
        "shared memory of GPUs that only one side sees",
        [
            *("cluster=slurm", "rollout.engine.device=cuda", "weight_sync=tensor", "dry_run=true"),
            *("weight_sync.verify=false", "parallel.dp=2"),
        ],
        ["weight_sync.transport=tensor", "rollout.engine.tp=2", "weight_sync.verify=false"],
    ),
    (
        "engines that may start later than trainers wait",
        ["rollout.engine.start_timeout_s=5000", "parallel.dp=2"],
        ["parallel.timeout_s=600", "rollout.engine.start_timeout_s"],
    ),
    (
        "parts sent over NCCL to the same devices",
        [
            *("cluster=slurm", "rollout.engine.device=cuda", "rollout.engine.colocated=true"),
            *("dry_run=true", "cluster.num_nodes=2", "cluster.engine_nodes=0"),
            "weight_sync=direct",
        ],
        ["weight_sync.transport=direct", "takes no device twice"],
    ),
    (
        "shared memory between hosts",
        ["cluster=slurm", "weight_sync=tensor", "dry_run=true", "cluster.num_nodes=2"],
        ["weight_sync.transport=tensor", "cluster.num_nodes=2"],
    ),
    ("task argument", ["data.args.digits=8"], ["data.task=sort", "digits"]),
    (
        "arguments that no domain reads",
        ["data.mixture={a: {task: sort}, b: {task: guess}}", "data.args.num_digits=4"],
        ["data.args={'num_digits': 4}", "data.mixture.<name>.args"],
    ),
    (
        "a mixture in which nearly everything is wrong",
        [
            *("data=mixture", "data.mixture.sort.task=sorting", "data.mixture.spell.timeout_s=-1"),
            "data.mixture.sort.sampling={max_new_tokens: 99, temperature: 0.5}",
        ],
        [
            *("data.mixture.sort.task=sorting: must be one of sort", "mixture.spell.timeout_s=-1"),
            "data.mixture.sort.sampling.temperature=0.5: trainers compute",
            "data.mixture.sort.sampling.max_new_tokens=99: at most",
        ],
    ),
    (
        "a domain's arguments",
        ["data=mixture", "data.mixture.sort.args={digits: 3}", "data.mixture.spell.reward=code"],
        ["data.mixture.sort.args={'num_digits': 8, 'digits': 3} of data.mixture.sort.task=sort"],
    ),
    (
        "a domain's filter",
        ["data=mixture", "data.mixture.sort.filters=[nosuch]"],
        ["data.mixture.sort.filters=nosuch"],
    ),
    ("more domains than groups", ["data=mixture", "rollout.prompts_per_step=1"], ["step=1: fewer"]),
    ("pairs of a mixture", ["data=mixture", "stage=preference"], ["data.mixture=sort, spell"]),
    ("reproducible races", ["rollout.oversample=0.5"], ["oversample=0.5: who finishes first"]),
    (
        "races that nobody waits for",
        ["rollout.oversample=0.5", "rollout=async", "rollout.engine.deterministic=false"],
        ["rollout.oversample=0.5: only with rollout.max_staleness_steps=0"],
    ),
    ("curriculum of one", ["data.curriculum.enabled=true"], ["at least two domains"]),
    ("no floor", ["data.curriculum.floor=0"], ["data.curriculum.floor=0.0"]),
    ("short memory", ["data.curriculum.memory_steps=0.5"], ["memory_steps=0.5", "at least 1"]),
    (
        "an evaluation set without end",
        ["eval.sets={all: {task: sort}}"],
        ["eval.sets.all.num_prompts=0: eval.sets.all.task=sort has no end"],
    ),
    (
        "greedy samples",
        ["eval.sets={best: {samples_per_prompt: 4, sampling: {temperature: 0}}}"],
        ["eval.sets.best.samples_per_prompt=4", "all the same"],
    ),
    (
        "an evaluation set's reward",
        ["eval.sets={a: {task: frozen_lake, num_prompts: 5, reward: math}}"],
        ["eval.sets.a.reward=math: compares with an answer"],
    ),
    (
        "a set named as a domain",
        ["data=mixture", "eval.sets={sort: {task: sort, num_prompts: 5}}"],
        ["eval.sets.sort: data.mixture has a domain"],
    ),
    (
        "one port of a run's agent and its set's",
        [
            *("data.generate=agent", "data.agent.command=[python, -m, a]"),
            *("rollout.agent_port=4000", "eval.sets={best: {sampling: {temperature: 0}}}"),
        ],
        ["rollout.agent_port=4000: data, eval.sets.best have an endpoint each; must be 0"],
    ),
    (
        "one port of two domains",
        [
            *("data=mixture", "data.generate=agent", "data.agent.command=[python, -m, a]"),
            "rollout.agent_port=4000",
        ],
        ["rollout.agent_port=4000: sort, spell have an endpoint each; must be 0"],
    ),
    ("GPU where there is none", ["rollout.engine.device=cuda"], ["rollout.engine.device=cuda"]),
    ("several nodes on one machine", ["cluster.num_nodes=2"], ["cluster.num_nodes=2"]),
    (
        "two engines on one node, whatever the nodes have together",
        [
            *("cluster=slurm", "dry_run=true", "cluster.num_nodes=3", "cluster.engine_nodes=2"),
            *("rollout.engine.num_engines=3", "rollout.engine.tp=4", "cluster.gpus_per_node=6"),
            *("rollout.engine.device=cuda", "rollout.host=0.0.0.0", "rollout.engine.host=0.0.0.0"),
        ],
        ["cluster.engine_nodes=2: one of them would need 8 GPUs", "cluster.gpus_per_node=6"],
    ),
    ("too few nodes", ["cluster=slurm", "cluster.num_nodes=1"], ["cluster.num_nodes=1"]),
    ("engine address", ["rollout.engine.urls=[host:1]"], ["rollout.engine.urls=host:1", "http"]),
    ("name with a slash", ["name=a/b", "run_dir=x"], ["name=a/b"]),
]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers on a machine that has GPUs."""
    monkeypatch.setattr("framework.cluster_checks.visible_gpus", list)


@pytest.mark.parametrize(
    ("arguments", "named"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN]
)
def test_broken_configuration_is_refused(
    arguments: list[str],
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = psutil.Process().children(recursive=True)
    assert main(arguments) == 2
    stdout, stderr = capsys.readouterr()
    for text in named:
        assert text in stderr
    assert all(line.startswith("drivetrain: ") for line in stderr.splitlines())
    assert "Traceback" not in stderr
    assert stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert psutil.Process().children(recursive=True) == before


def test_everything_wrong_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["parallel.pp=3", "parallel.ep=2", "rollout.sampling.top_p=0.5", "optimizer.lr=0"]
    assert main([*arguments, "run_dir=/tmp/never"]) == 2
    stderr = capsys.readouterr().err
    for key in ("parallel.pp=3", "parallel.ep=2", "rollout.sampling.top_p=0.5", "optimizer.lr=0"):
        assert key in stderr


@pytest.mark.parametrize("arguments", [["parallel.tpp=2"], ["mode=nothing"], ["parallel.pp=3"]])
def test_refusal_of_the_command_itself(arguments: list[str], tmp_path: Path) -> None:
    """As a user runs it: status 2, one line each, quickly, without a traceback."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "framework.main", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("drivetrain: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - start < 20


def test_a_run_directory_is_never_reused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "earlier"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("name: earlier\n")
    assert main([f"run_dir={run_dir}"]) == 2
    error = capsys.readouterr().err
    assert f"run_dir={run_dir}: already holds a run" in error
    assert "resume=auto" not in error  # which would be refused: it saved no checkpoint
    assert main([f"run_dir={run_dir}", "dry_run=true"]) == 0  # it writes nothing
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]


def test_journal_must_be_long_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in range(3):
        (tmp_path / f"step_{step:06d}.msgpack").touch()
    arguments = ["mode=train_only", f"replay_dir={tmp_path}", "num_steps=5"]
    assert main(arguments) == 2
    stderr = capsys.readouterr().err
    assert "step_000003.msgpack" in stderr
    assert "3 of its steps" in stderr
    assert check_config(compose_config([*arguments[:2], "num_steps=3"])) == []


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"hidden_size": 64}', "num_attention_heads"),
        ('{"hidden_size": 64, "num_attention_heads": "4"}', "num_attention_heads is '4'"),
    ],
)
def test_broken_model_config(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    (error,) = check_config(compose_config([f"model.hf_path={tmp_path}"]))
    assert f"model.hf_path={tmp_path}" in error
    assert named in error


def test_layout_is_checked_against_the_models_own_shape(tmp_path: Path) -> None:
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    model = f"model.hf_path={tmp_path}"
    (error,) = check_config(compose_config([model, "parallel.tp=3", "parallel.pp=5"]))
    assert error == f"{model}: no *.safetensors in it"
    (tmp_path / "model.safetensors").touch()
    assert check_config(compose_config([model, "parallel.tp=3", "parallel.pp=5"])) == []
    # 9 heads in 9 parts is fine (more parts than key-value heads, a multiple of them), 1536 is not.
    (error,) = check_config(compose_config([model, "parallel.tp=9"]))
    assert error == "parallel.tp=9: does not divide the feed-forward size 1536"
    (error,) = check_config(compose_config([model, "parallel.pp=4"]))
    assert error == "parallel.pp=4: does not divide the model's 30 layers"


EXPERT_LAYOUTS = [
    ({"tp": 4, "sequence_parallel": "true", "ep": 8, "dp": 4}, ""),
    ({"tp": 2, "sequence_parallel": "true", "ep": 4, "etp": 2, "dp": 4, "pp": 2, "vpp": 4}, ""),
    ({"cp": 8, "ep": 8}, ""),
    ({"pp": 5, "first_stage_layers": 9, "last_stage_layers": 9}, ""),
    ({"tp": 4, "dp": 2}, "parallel.sequence_parallel=False"),
    ({"ep": 3, "dp": 3}, "parallel.ep=3: does not divide the model's 128 experts"),
    ({"etp": 512, "dp": 512}, "parallel.etp=512: does not divide the experts' width 768"),
    ({"ep": 8, "dp": 4}, "parallel.ep=8: ep * etp = 8 must divide the 4 ranks"),
    ({"pp": 4, "vpp": 5}, "parallel.vpp=5: does not divide the 12 layers"),
    ({"pp": 5, "first_stage_layers": 9}, "parallel.pp=5: does not divide the 39 layers left"),
    ({"pp": 2, "vpp": 2, "first_stage_layers": 23}, "first_stage_layers=23: must be a multiple"),
]


@pytest.mark.parametrize(("sizes", "named"), EXPERT_LAYOUTS)
def test_layouts_of_experts_and_stages(sizes: dict, named: str) -> None:
    arguments = [f"parallel.{key}={value}" for key, value in sizes.items()]
    arguments += ["rollout.prompts_per_step=64", "model.hf_path=hf_configs/qwen3_30b_a3b"]
    arguments += ["dry_run=true"]  # without weights
    errors = check_config(compose_config(arguments))
    assert bool(errors) == bool(named), errors
    assert all(named in error or "parallel." in error for error in errors)
    assert any(named in error for error in errors) == bool(named)


def test_trainers_start_from_a_megatron_checkpoint_and_engines_do_not(tmp_path: Path) -> None:
    start = ["warm_start.num_steps=0", f"model.init_from={tmp_path}", f"run_dir={tmp_path / 'run'}"]
    (error,) = check_config(compose_config(start))
    assert "no config.json" in error
    (tmp_path / ".metadata").touch()
    assert check_config(compose_config(start)) == []
    (error,) = check_config(compose_config([*start, "mode=eval"]))
    assert f"model.init_from={tmp_path}: a Megatron checkpoint" in error
    assert "drivetrain-convert to-hf" in error


def test_a_critic_starts_from_a_checkpoint_that_has_a_head(tmp_path: Path) -> None:
    start = ["algorithm=ppo", f"critic.init_from={tmp_path}", f"run_dir={tmp_path / 'run'}"]
    (tmp_path / ".metadata").touch()
    for architecture, said in (
        ("Qwen3ForCausalLM", [f"critic.init_from={tmp_path}: a Megatron checkpoint without a"]),
        ("Qwen3ForSequenceClassification", []),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        errors = check_config(compose_config(start))
        assert len(errors) == len(said)
        assert all(error.startswith(each) for error, each in zip(errors, said, strict=True))


SIGMOID_ROUTERS = [
    ("hf_configs/deepseek_v3", "DeepseekV3ForCausalLM"),
    ("hf_configs/glm_4_5", "Glm4MoeForCausalLM"),
]


@pytest.mark.parametrize(("path", "architecture"), SIGMOID_ROUTERS)
def test_an_engine_that_fuses_shared_experts_is_not_called_known(path, architecture) -> None:
    """On GPUs SGLang does so unasked; told not to, it has the layout that is known on CPUs."""
    model = [f"model.hf_path={path}", "dry_run=true"]
    apart = "+rollout.engine.args.disable_shared_experts_fusion=true"
    for transport in ("distributed", "delta", "direct"):
        arguments = [*model, f"weight_sync={transport}"]
        assert check_config(compose_config(arguments)) == []
        on_gpus = [*arguments, "cluster=slurm", "weight_sync.verify=false"]
        found = [e for e in check_config(compose_config(on_gpus)) if "shared expert" in e]
        assert len(found) == (transport != "distributed")
        assert all(e.startswith(f"weight_sync.transport={transport}: on GPUs") for e in found)
        assert all(architecture in e and e.endswith(f"set {apart}") for e in found)
        told = check_config(compose_config([*arguments, "cluster=slurm", apart]))
        assert not [error for error in told if "shared expert" in error]
    errors = check_config(compose_config([*model, "cluster=slurm"]))
    assert any(error.startswith("weight_sync.verify=True: on GPUs SGLang") for error in errors)


def test_latent_attention_on_a_cpu_is_served_deterministically_or_not_at_all() -> None:
    arguments = ["model.hf_path=hf_configs/deepseek_v3", "dry_run=true"]
    (error,) = check_config(compose_config([*arguments, "rollout.engine.deterministic=false"]))
    assert error.startswith("rollout.engine.deterministic=False: on a CPU SGLang")


@pytest.mark.parametrize("layout", ["single", "dp2", "tp2", "pp2"])
def test_quickstart_is_accepted_in_every_layout(layout: str) -> None:
    config = compose_config(["experiment=quickstart", f"parallel={layout}"])
    assert check_config(config) == []


def test_smoke_is_accepted() -> None:
    assert check_config(compose_config(["experiment=smoke", "rollout=async"])) == []


@pytest.mark.parametrize("data", ["sort", "chain_sum", "basic_arithmetic", "mixture"])
def test_bundled_tasks_are_accepted(data: str) -> None:
    assert check_config(compose_config([f"data={data}"])) == []


def test_arguments_of_a_yamls_task_go_where_a_mixture_takes_its_place() -> None:
    config = compose_config(["experiment=smoke", "data=mixture", "data.eval_num_prompts=8"])
    assert config.data.args == {}
    assert check_config(config) == []


def test_every_number_of_the_configuration_has_a_rule() -> None:
    """A new number must say what it may be, here or below."""
    own_checks = {"dry_run_rank", "rollout.sampling.top_p", "rollout.sampling.top_k"}
    fractions = {"optimizer.beta1", "optimizer.beta2", "warm_start.beta2"}
    numbers = {key for key, field in config_fields().items() if field.type_name in ("int", "float")}
    ruled = {*POSITIVE, *NOT_NEGATIVE} | fractions
    assert numbers - ruled == own_checks
    assert set(CHOICES) | ruled <= set(config_fields())


def test_fp8_weights_go_to_engines_that_somebody_started() -> None:
    line = ["weight_sync.quantization=fp8", "weight_sync.verify=false", "gate.enabled=false"]
    assert check_config(compose_config([*line, "rollout.engine.urls=[http://h:1]"])) == []
