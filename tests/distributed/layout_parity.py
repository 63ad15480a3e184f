"""Trains the table of layouts: processes, models and journal; what each row is off by.

megatron-core is imported once, in the process that calls `measure`; the ranks are forked from it.
Each row has ranks of its own, one row after the other.
"""

import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # every optimizer imports it, for seconds: once here and not in each rank
from layouts import MODELS, MOE, NOISY, OBJECTIVES, PREFERENCES, Case
from safetensors.torch import load_file, save_file

from framework.advantage_tables import VALUED
from framework.config import (
    AlgorithmConfig,
    BatchConfig,
    EvalConfig,
    GateConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)
from framework.config_critic import CriticConfig
from framework.config_lora import LoraConfig
from framework.critic import build_credit, build_critic
from framework.megatron.model import Policy
from framework.megatron.offload import Offload
from framework.megatron.parallel import Mesh, start_mesh, stop_mesh
from framework.train import build_models, trainer_class
from framework.weight_sync.base import PushReport
from megatron_bridge.conversion import to_megatron
from megatron_bridge.export import export_buckets
from megatron_bridge.export_plan import ExportPlan
from megatron_bridge.load import detect_spec
from rollout.batch import make_batch
from rollout.config import RolloutConfig
from rollout.journal import write_step
from rollout.source import JournalSource
from rollout.types import Group, Sample, StepBatch
from tests.forked_ranks import run_ranks
from tests.random_weights import random_weights

NUM_STEPS = 3
UPDATES_PER_STEP = 2  # from the second on the policy is not the old policy, and ratios not 1
GROUPS = 4
EPS = 1e-5
"""AdamW's usual 1e-8 would turn the rounding error of a gradient near zero into a whole update."""
BUCKET_BYTES = 1 << 16
CASE_TIMEOUT_S = 120.0
TEACHER_TOP_K = 5


def measure(root: Path, cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Train one rank for each model, then every case; a row of figures for each, by world size."""
    write_journal(root / "rollouts")
    models = [name for case in cases for name in (case.model, plain_model(case)) if name]
    for model in dict.fromkeys(models):
        create_model(model, root / "models" / model)
        to_megatron(root / "models" / model, root / "megatron" / model, max_file_bytes=1 << 30)
    plain = [plain_twin(case) for case in cases if plain_model(case)]
    alone = [*map(one_rank, cases), *plain]
    for case in {each.name: each for each in alone}.values():
        run_case(root, case)
    for case in sorted(cases, key=lambda case: case.world_size):
        run_case(root, case)
        yield compare(root, case)


def run_case(root: Path, case: Case) -> None:
    """Train a case, in forked ranks of its own; RuntimeError when one fails.

    Ranks that went on from case to case would keep gloo's threads of every group there was.
    """
    work = functools.partial(train, root, case)
    run_ranks(case.name, case.world_size, work, root, CASE_TIMEOUT_S)


def one_rank(case: Case) -> Case:
    """What a case is measured against."""
    return Case(case.model, objective=case.objective, lora=case.lora)


def plain_twin(case: Case) -> Case:
    """A case with multi-token prediction, in its own layout without."""
    return replace(case, model=plain_model(case))


def plain_model(case: Case) -> str:
    """The same model without multi-token prediction; empty where it has none."""
    return case.model.removesuffix("_mtp") if case.model.endswith("_mtp") else ""


def compare(root: Path, case: Case) -> dict[str, Any]:
    """How far a case ended from one rank: relative for figures, absolute for weights (and for the
    losses of NOISY)."""
    reference = one_rank(case)
    found, wanted = (_results(root, each) for each in (case, reference))
    weights, expected, start = (
        load_file(path)
        for path in (
            _path(root, case).with_suffix(".safetensors"),
            _path(root, reference).with_suffix(".safetensors"),
            root / "models" / case.model / "model.safetensors",
        )
    )
    assert weights.keys() == expected.keys()
    worst = max(weights, key=lambda name: _difference(weights[name], expected[name]))
    row: dict[str, Any] = {
        "name": case.name,
        "processes": case.world_size,
        "weight_abs": _difference(weights[worst], expected[worst]),
        "weight_worst": worst,
        "moved_abs": max(
            _difference(expected[name], start[name]) for name in start if name in expected
        ),
        "time_s": found["time_s"],
    }
    if plain_model(case):
        twin = load_file(_path(root, plain_twin(case)).with_suffix(".safetensors"))
        row["plain_abs"] = max(_difference(twin[name], weights[name]) for name in twin)
        row["moved_mtp"] = max(
            _difference(expected[n], start[n]) for n in expected.keys() - twin.keys()
        )
        row["mtp_loss_abs"], row["mtp_accuracy_abs"] = (
            max(
                abs(a[f"train/mtp_{key}"] - b[f"train/mtp_{key}"])
                for a, b in zip(found["steps"], wanted["steps"], strict=True)
            )
            for key in ("loss", "accuracy")
        )
    for key in ("loss", "entropy", "grad_norm"):
        pairs = zip(found["steps"], wanted["steps"], strict=True)
        name = f"train/{key}"
        if name not in found["steps"][0]:  # stage=preference has no entropy
            row[f"{key}_rel"] = 0.0
            continue
        least = 1.0 if key == "loss" and case.objective in NOISY else 0.0
        row[f"{key}_rel"] = max(abs(a[name] - b[name]) / max(abs(b[name]), least) for a, b in pairs)
    return row


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


def _path(root: Path, case: Case) -> Path:
    return root / f"{case.name.replace(' ', '_')}.json"


def _results(root: Path, case: Case) -> dict[str, Any]:
    return json.loads(_path(root, case).read_text())


def create_model(model: str, path: Path) -> None:
    """A Hugging Face directory with random weights, norms too."""
    path.mkdir(parents=True)
    config = MODELS[model]
    (path / "config.json").write_text(json.dumps(config))
    save_file(random_weights(config, 7), path / "model.safetensors")


def write_journal(rollouts: Path) -> None:
    """Groups of random lengths; longer answers tend to earn more, so that the loss is not small."""
    rollouts.mkdir(parents=True)
    random = np.random.default_rng(3)
    for step in range(NUM_STEPS):
        groups = []
        for group_id in range(step * GROUPS, (step + 1) * GROUPS):
            prompt = random.integers(0, 101, random.integers(2, 20))
            samples = [_sample(random, group_id, index, prompt) for index in range(4)]
            groups.append(Group(group_id=group_id, start_version=step, samples=samples))
        write_step(rollouts, *make_batch(step, groups, generate_time_s=1.0))


def _sample(random: np.random.Generator, group_id: int, index: int, prompt: np.ndarray) -> Sample:
    length = int(random.integers(1, 40))
    mask = random.random(length) < 0.9
    mask[-1] = True
    sample = Sample(
        group_id=group_id,
        index=index,
        tokens=np.concatenate([prompt, random.integers(0, 101, length)]).astype(np.int32),
        prompt_length=len(prompt),
        loss_mask=mask.astype(np.uint8),
        rollout_logprobs=(-random.exponential(3, length) * mask).astype(np.float32),
        # Of several ages, each constant in its answer.
        versions=np.where(mask, max(0, group_id // GROUPS - index), -1).astype(np.int32),
        turn_starts=np.arange(0, length, 7, dtype=np.int32),
        turn_states=[f"state {k % 2}" for k, _ in enumerate(range(0, length, 7))],
        turn_rewards=[k / 8 for k, _ in enumerate(range(0, length, 7))],
        reward=float(length / 20 + random.random()),
    )
    sample.routes = _routes(group_id, index, len(sample.tokens) - 1)
    # The teacher likes what the policy found unlikely: advantages of either sign.
    sample.teacher_logprobs = np.minimum(-1 - 0.5 * sample.rollout_logprobs, 0) * mask
    own = np.random.default_rng((group_id, index))  # the samples are those of every other row
    top = [own.choice(101, TEACHER_TOP_K, replace=False) for _ in range(length)]
    sample.teacher_top_ids = np.array(top, dtype=np.int32)
    shares = own.dirichlet(np.ones(TEACHER_TOP_K + 1), length)[:, 1:]
    sample.teacher_top_logprobs = np.log(shares + 1e-3).astype(np.float32).clip(max=0)
    return sample


def _routes(group_id: int, index: int, num_tokens: int) -> np.ndarray:
    """[num_tokens, layers * k] uint8: experts that no router chose."""
    random = np.random.default_rng((group_id, index))
    layers, experts, k = (
        MOE[name] for name in ("num_hidden_layers", "num_experts", "num_experts_per_tok")
    )
    chosen = random.random((num_tokens, layers, experts)).argsort(-1)[..., :k]
    return chosen.reshape(num_tokens, layers * k).astype(np.uint8)


def objective(case: Case, hf_dir: Path) -> dict[str, Any]:
    """What of a RunConfig says by what the case is trained."""
    if case.objective in PREFERENCES:
        return {
            "stage": "reward_model" if case.objective == "reward_model" else "preference",
            "algorithm": AlgorithmConfig(**PREFERENCES[case.objective]),
            "eval": EvalConfig(at_start=False, at_end=False),
        }
    fields = OBJECTIVES[case.objective]
    found: dict[str, Any] = {
        "algorithm": AlgorithmConfig(updates_per_step=UPDATES_PER_STEP, **fields)
    }
    if fields.get("loss") == "generalized_jsd":
        found["rollout"] = RolloutConfig(teacher_top_k=TEACHER_TOP_K)
    if fields.get("advantage") in VALUED.rows:
        # From a directory of its own: the policy's may be a Megatron checkpoint.
        whiten = fields["advantage"] == "gae"  # else the loss of a token mean would be nearly 0
        found["critic"] = CriticConfig(init_from=str(hf_dir), lr=1e-3, whiten=whiten)
    return found


def adapters(case: Case) -> LoraConfig:
    """Those that the case trains, or none."""
    return LoraConfig(rank=3, alpha=24, targets=list(case.lora)) if case.lora else LoraConfig()


class Recorder:
    """In place of the metrics logger."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Keep what the trainer reports."""
        self.steps.append({k: v for k, v in metrics.items() if k.startswith("train/")})


class WholeBetweenSteps:
    """In place of the weight sync where parameters are cut: a push wants them whole."""

    def push(self, version: int) -> PushReport:
        """Nobody to push to; the trainer has made the parameters whole for it."""
        return PushReport(size_bytes=0, time_s=0.0, verify_s=0.0)

    def ask(self, version: int, question: Callable[[], StepBatch]) -> StepBatch:
        """As `WeightSync`; the journal answers every rank."""
        return question()

    def trainers_turn(self) -> None:
        """As `WeightSync`."""


class OffloadBetweenSteps:
    """In place of the weight sync where engines share our devices."""

    def __init__(self, *models: Policy) -> None:
        self._models = models
        self._offload = Offload(*models, everything=True)

    def push(self, version: int) -> PushReport:
        """Nothing to push to: only what follows it."""
        self._offload.away()
        chunks = [chunk for model in self._models for chunk in model.chunks]
        state = [parameter for chunk in chunks for parameter in chunk.parameters()]
        assert not sum(parameter.untyped_storage().nbytes() for parameter in state)
        wrapped: list[Any] = [each for model in self._models for each in model.wrapped]
        for buffer in (each for model in wrapped for each in model.buffers):
            assert not buffer.grad_data.untyped_storage().nbytes()
        return PushReport(size_bytes=0, time_s=0.0, verify_s=0.0)

    def ask(self, version: int, question: Callable[[], StepBatch]) -> StepBatch:
        """There is no engine that could come back meanwhile."""
        return question()

    def trainers_turn(self) -> None:
        """As `WeightSync`."""
        self._offload.back()


def train(root: Path, case: Case, rank: int) -> None:
    """One case on one rank: the trainer's own loop over the journal; rank 0 leaves the outcome."""
    hf_dir = root / "models" / case.model
    # Those with stages start from a Megatron checkpoint, which must be the same.
    # A reward model has another output layer than that holds.
    staged = case.parallel.get("pp", 1) > 1 and case.objective != "reward_model"
    start = str(root / "megatron" / case.model) if staged else ""
    config = RunConfig(
        mode="train_only",
        num_steps=NUM_STEPS,
        model=ModelConfig(
            hf_path=str(hf_dir), init_from=start, lora=adapters(case), mtp=bool(plain_model(case))
        ),
        parallel=ParallelConfig(timeout_s=CASE_TIMEOUT_S, **case.parallel),
        memory=MemoryConfig(**case.memory),
        **{"eval": EvalConfig(at_start=False, at_end=False), **objective(case, hf_dir)},
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=1, weight_decay=0.01, eps=EPS),
        batch=BatchConfig(max_tokens_per_microbatch=96),
        gate=GateConfig(enabled=False),
    )
    started = time.perf_counter()
    mesh = start_mesh(config.parallel, config.seed)
    critic = build_critic(config, mesh, None)
    policy, reference = build_models(config, mesh, None)
    if case.planted:
        for parameter in policy.chunks[0].parameters():
            setattr(parameter, "sequence_parallel", False)  # noqa: B010
    recorder: Any = Recorder() if rank == 0 else None
    source = JournalSource(root / "rollouts")
    models = [policy] if critic is None else [policy, critic.model]
    sync: Any = OffloadBetweenSteps(*models) if case.offload else None
    if config.parallel.fsdp:
        sync = WholeBetweenSteps()
    trainer_class(config)(
        config=config,
        mesh=mesh,
        policy=policy,
        source=source,
        sync=sync,
        logger=recorder,
        reference=reference,
        **({} if critic is None else {"critic": critic}),
        credit=build_credit(config, mesh, None),
    ).train()
    if sync is not None:
        sync.trainers_turn()
    weights = whole_weights(policy, mesh, config)
    if critic is not None:
        of_critic = whole_weights(critic.model, mesh, config)
        weights |= {f"critic.{name}": tensor for name, tensor in of_critic.items()}
    stop_mesh()
    if rank == 0:
        save_file(weights, _path(root, case).with_suffix(".safetensors"))
        outcome = {"steps": recorder.steps, "time_s": time.perf_counter() - started}
        _path(root, case).write_text(json.dumps(outcome))


def whole_weights(policy: Policy, mesh: Mesh, config: RunConfig) -> dict[str, torch.Tensor]:
    """Every Hugging Face tensor of a model, on rank 0."""
    policy.sync_parameters()
    plan = ExportPlan(
        hf_config=policy.hf_config,
        layout=mesh.layout,
        spec=detect_spec(policy.chunks),
        dtype=torch.float32,
        vocab_pad_multiple=config.model.vocab_pad_multiple,
        bucket_bytes=BUCKET_BYTES,
    )
    weights = {}
    with export_buckets(plan, policy.chunks, mesh.rank) as stream:
        for bucket in stream:
            for name, tensor in zip(bucket.names, bucket.tensors, strict=True):
                weights[name] = tensor.clone()
    return weights
