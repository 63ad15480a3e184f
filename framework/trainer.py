"""One trainer rank: take -> logprobs -> advantages -> pack -> step -> publish -> log."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from framework.batching import UpdatePlan, plan_step
from framework.config import RunConfig
from framework.flops import forward_flops, training_flops
from framework.gate import check_gate
from framework.lora_checks import uses_lora
from framework.megatron.checkpoint import CheckpointWriter
from framework.megatron.credit import TokenCredit
from framework.megatron.critic import Critic
from framework.megatron.microbatch import Microbatch, pack_microbatch
from framework.megatron.model import Policy, token_grain
from framework.megatron.parallel import Mesh
from framework.megatron.reference import ReferencePolicy
from framework.megatron.routing_replay import RoutingReplay
from framework.megatron.selection import select_tokens
from framework.megatron.step import StepRunner
from framework.metrics import MetricsLogger, set_figures, step_means
from framework.objective import build_objective, effective_sample_fraction
from framework.overlong import recount, shorten_batch, shorten_sample
from framework.profiling import Phases, StepProfiler
from framework.throughput import step_figures, this_device_peak_flops
from framework.weight_sync import WeightSync
from rollout.source import BatchSource
from rollout.types import Sample, StepBatch
from rollout.watchdog import Watchdog


@dataclass
class Trainer:
    """Everything one rank needs for the loop."""

    config: RunConfig
    mesh: Mesh
    policy: Policy
    source: BatchSource
    sync: WeightSync | None
    """None where no engine follows the training (stage=sft, mode=train_only)."""
    logger: MetricsLogger | None
    """On the reporting rank (0)."""
    reference: ReferencePolicy | None = None
    """Where algorithm.kl_coef or kl_reward_coef asks for one."""
    critic: Critic | None = None
    """Where algorithm.advantage asks for one."""
    credit: TokenCredit | None = None
    """Where it asks for rewards of tokens."""
    checkpoints: CheckpointWriter | None = None
    """None: this run saves none."""
    start_step: int = 0
    """Steps that the checkpoint we go on from had trained."""

    def __post_init__(self) -> None:
        sft = self.config.stage == "sft"
        self.num_updates = 1 if sft else self.config.algorithm.updates_per_step
        self.objective = build_objective(self.config)
        self.prepare(1.0 if sft else self.config.rollout.sampling.temperature)
        algorithm = self.config.algorithm
        self.old_pass = (
            (self.num_updates > 1 and algorithm.old_logprobs == "trainer")
            or algorithm.recompute_old_logprobs
            or algorithm.kl_reward_coef > 0
            or algorithm.routing_replay == "old_policy"
            or self.objective.selection is not None
        )
        if self.old_pass:
            self.step_flops += forward_flops(self.policy.hf_config)
        if self.critic is not None:
            of_critic = self.critic.model.hf_config
            self.step_flops += forward_flops(of_critic) + training_flops(of_critic)
        self.routing: RoutingReplay | None = None
        if self.policy.config.num_moe_experts and not sft:
            self.routing = RoutingReplay(self.policy, self.config.algorithm.routing_replay)
            self.runner.routing = self.routing

    def prepare(self, temperature: float) -> None:
        """What every kind of step needs."""
        self.runner = StepRunner(
            self.policy, self.mesh, temperature, self.config.memory.logits_chunk_tokens
        )
        cp = self.mesh.layout.cp
        self.length_multiple = 2 * cp if cp > 1 else 1
        self.flops = training_flops(self.policy.hf_config, frozen=uses_lora(self.config))
        self.step_flops = self.flops
        if self.reference is not None:
            self.step_flops += forward_flops(self.policy.hf_config)
        self.phases = Phases()
        self.watchdog = Watchdog(f"trainer rank {self.mesh.rank}", self.config.cluster.watchdog_s)

    def train(self) -> None:
        """The loop, whole."""
        config = self.config
        self.push(self.start_step)
        self.evaluate(0, config.eval.at_start and self.start_step == 0)
        profiler = StepProfiler(config.profile, Path(config.run_dir, "profile"), self.mesh.rank)
        for step in range(self.start_step, config.num_steps):
            version = step + 1
            with profiler.step(version):
                self.one_step(step)
            every = config.eval.every_steps
            last = version == config.num_steps
            due = config.eval.at_end if last else bool(every) and version % every == 0
            self.evaluate(version, due)
            self.save(version, last)
        profiler.finish()
        if self.checkpoints is not None:
            self.checkpoints.finish()

    def one_step(self, step: int) -> None:
        """Wait for the batch of `step`, train on it, bring the engines to the next version, log."""
        if self.mesh.rank == 0:
            self.source.publish(step)
        start = time.perf_counter()
        with self.watchdog.watch(f"the batch of step {step}", self.source.missing):
            batch = self.take(step)
        taken = time.perf_counter()
        if self.sync is not None:
            with self.phases.measure("turn"):
                self.sync.trainers_turn()
        with self.watchdog.watch(f"its own and the other ranks' part of step {step}"):
            metrics = self.train_step(batch)
        self.refresh_reference(step + 1)
        trained = time.perf_counter()
        sync_metrics = self.push(step + 1)
        end = time.perf_counter()
        times = step_figures(
            [info.prompt_length + info.response_length for info in batch.samples],
            self.step_flops,
            wait_s=taken - start,
            train_s=trained - taken,
            sync_s=end - trained,
            num_ranks=self.mesh.layout.world_size,
            peak_flops=this_device_peak_flops(),
        )
        figures = {**batch.metrics, **metrics, **sync_metrics, **times, **self.phases.take()}
        self.log(step + 1, figures)

    def take(self, step: int) -> StepBatch:
        """The batch of `step`. Engines that die while we wait for it come back at this version."""
        batch = None
        if self.sync is not None:
            batch = self.sync.ask(step, lambda: self.source.take(step))
        return self.source.take(step) if batch is None else batch

    def refresh_reference(self, version: int) -> None:
        """algorithm.reference_refresh_steps: the policy of this version is the new reference."""
        every = self.config.algorithm.reference_refresh_steps
        if self.reference is not None and every and version % every == 0:
            self.policy.sync_parameters()
            self.reference.refresh()

    def train_step(self, batch: StepBatch) -> dict[str, float]:
        """Train on one batch; returns its figures, the same on every rank."""
        batch, lost = self.fit(batch)
        plans = self.plan(batch)
        with self.phases.measure("fetch"):
            samples = self.fetch(batch, plans, shortened=lost)
        batch = recount(batch, lost, samples)
        with self.phases.measure("pack"):
            advantages = self.objective.advantages(batch, samples)
            updates = [self.pack(plan, batch, samples, advantages) for plan in plans]
        self.score(updates, batch)
        valued = self.credit.assign(updates, batch.samples) if self.credit is not None else {}
        selection = self.objective.selection
        if selection is not None:
            for microbatches in updates:
                select_tokens(microbatches, selection, self.mesh, batch.step)
        metrics = self.make_updates(updates, batch.step)
        if self.config.batch.overlong == "truncate":
            metrics["train/truncated_samples"] = len(lost)
            metrics["train/truncated_tokens"] = sum(lost.values())
        if self.config.stage == "sft":  # no engine wrote these tokens
            return {k: v for k, v in metrics.items() if "rollout" not in k}
        return {
            **metrics,
            **valued,
            **effective_sample_fraction(metrics),
            "train/num_microbatches": sum(plan.num_microbatches for plan in plans),
        }

    def score(self, updates: list[list[Microbatch]], batch: StepBatch) -> None:
        """Add to the micro-batches what policy, reference and critic say before any update."""
        # Where a run begins or goes on; samples of older versions would differ by right.
        begins = batch.step == self.start_step and self.config.stage == "rl"
        gate = begins and self.config.gate.enabled and batch.staleness_max == 0
        if begins and not gate and self.mesh.rank == 0:
            print("gate: not checked: switched off, or a batch of older versions", flush=True)
        if gate or self.old_pass:
            with self.phases.measure("old_logprobs"):
                for microbatches in updates:
                    self.runner.logprobs(microbatches)
        if gate:
            check_gate(updates, self.mesh, self.config, self.start_step)
        if self.reference is not None:
            with self.phases.measure("ref_logprobs"), self.reference.swapped_in():
                for microbatches in updates:
                    self.runner.logprobs(microbatches, of_reference=True)
        if self.critic is not None:
            with self.phases.measure("values"):
                self.critic.value(updates)

    def make_updates(self, updates: list[list[Microbatch]], step: int) -> dict[str, float]:
        """The optimizer's steps of one batch; their mean figures."""
        figures: list[dict[str, float]] = []
        lr = 0.0
        for i, microbatches in enumerate(updates):
            own_step = step - self.config.critic.policy_starts_at_step
            lr = self.learning_rate(own_step * len(updates) + i)
            with self.phases.measure("update"):
                figures.append(self.runner.update(microbatches, self.objective, lr))
            if self.critic is not None:
                with self.phases.measure("critic_update"):
                    figures[i] |= self.critic.update(microbatches, step * len(updates) + i)
        return {**step_means(figures), "train/lr": lr}

    def fit(self, batch: StepBatch) -> tuple[StepBatch, dict[int, int]]:
        """batch.overlong: the batch with no sample over the budget, and what each one lost."""
        if self.config.batch.overlong == "refuse":  # plan_step does
            return batch, {}
        budget = self.config.batch.max_tokens_per_microbatch
        return shorten_batch(batch, budget // self.length_multiple * self.length_multiple)

    def plan(self, batch: StepBatch) -> list[UpdatePlan]:
        """Who trains what; the same on every rank."""
        layout = self.mesh.layout
        return plan_step(
            [info.prompt_length + info.response_length for info in batch.samples],
            dp=layout.dp,
            max_tokens=self.config.batch.max_tokens_per_microbatch,
            num_updates=self.num_updates,
            length_multiple=self.length_multiple,
            microbatch_multiple=layout.pp if layout.vpp > 1 else 1,
            pipelined=layout.pp > 1,
            cost=self.flops,
        )

    def fetch(
        self, batch: StepBatch, plans: list[UpdatePlan], shortened: Collection[int]
    ) -> dict[int, Sample]:
        """This rank's own samples, by index into the batch, cut where the batch says so."""
        mine = sorted(i for plan in plans for i in plan.samples_of(self.mesh.coords.dp))
        samples = dict(zip(mine, self.source.fetch(batch.step, mine), strict=True))
        for i in samples.keys() & shortened:
            samples[i] = shorten_sample(samples[i], batch.samples[i].response_length)
        return samples

    def pack(
        self,
        plan: UpdatePlan,
        batch: StepBatch,
        samples: dict[int, Sample],
        advantages: list[torch.Tensor],
    ) -> list[Microbatch]:
        """This rank's micro-batches of one update."""
        counts = {
            i: batch.samples[i].num_loss_tokens
            for dp in range(self.mesh.layout.dp)
            for i in plan.samples_of(dp)
        }
        weights = self.objective.weights(counts)
        mine = plan.microbatches[self.mesh.coords.dp]
        by_index = dict(enumerate(advantages))
        parallel = self.config.parallel
        return [
            pack_microbatch(
                indices,
                samples,
                by_index,
                weights,
                self.mesh,
                parallel.sequence_parallel,
                batch.step,
                self.objective.teacher_top_k,
                self.routing and self.routing.layout,
                token_grain(self.config.model),
            )
            for indices in mine
        ]

    def learning_rate(self, update: int) -> float:
        """Linear warm-up, then constant: a function of the update's number alone.

        0 before the first one (0): while only the critic learns.
        """
        optimizer = self.config.optimizer
        if update < 0:
            return 0.0
        return optimizer.lr * min(1.0, (update + 1) / max(1, optimizer.warmup_steps))

    def push(self, version: int) -> dict[str, float]:
        """Bring the engines to this version."""
        if self.sync is None:
            return {}
        self.policy.sync_parameters()
        with self.watchdog.watch(f"the push of version {version}"):
            report = self.sync.push(version)
            # No rank goes on before the engines have the weights: some have nothing to send.
            dist.barrier()
        return {
            "perf/weight_sync_bytes": float(report.size_bytes),
            "perf/weight_verify_s": report.verify_s,
        }

    def evaluate(self, version: int, due: bool) -> None:
        """Measure accuracy where it is due and an engine is there; all ranks wait for it."""
        if not due or self.sync is None:
            return
        with self.watchdog.watch(f"the evaluation of version {version}", self.source.missing):
            result = self.sync.ask(version, lambda: self.source.evaluate(version))
        if result is not None:
            self.log(
                version,
                {
                    "eval/accuracy": result.accuracy,
                    "eval/reward_mean": result.reward_mean,
                    "eval/failed_fraction": result.failed_fraction,
                    "eval/response_length_mean": result.response_length_mean,
                    "eval/time_s": result.time_s,
                    **set_figures(result),
                },
            )
        dist.barrier()

    def save(self, version: int, last: bool) -> None:
        """Begin a checkpoint where one is due; else see to the one that is being written."""
        if self.checkpoints is None:
            return
        if last or version % self.config.checkpoint.every_steps == 0:
            state = self.source.snapshot(version) if self.mesh.rank == 0 else b""
            if self.sync is not None:
                self.sync.trainers_turn()
            self.checkpoints.save(version, state, self.credit.state() if self.credit else None)
            if self.config.rollout.engine.colocated and not last:
                self.push(version)  # the engines gave their weights away for it
        else:
            self.checkpoints.poll()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write figures, on the rank that does."""
        if self.logger is not None:
            self.logger.log(step, metrics)
            shown = ("train/loss", "train/grad_norm", "perf/step_time_s", "eval/accuracy")
            figures = (f"{name} {metrics[name]:.4g}" for name in shown if name in metrics)
            print(f"step {step}: {', '.join(figures)}", flush=True)
