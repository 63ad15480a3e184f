"""stage=preference on one rank: take -> pair plan -> pack -> reference -> step -> log."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from framework.algorithm.preference.inputs import Answers
from framework.batching import UpdatePlan, plan_step
from framework.batching.pairs import plan_pairs
from framework.demonstrations import HELD_OUT
from framework.megatron.figures import sum_figures
from framework.megatron.microbatch import Microbatch, pack_microbatch
from framework.megatron.model import token_grain
from framework.megatron.step import Evaluate, no_tokens
from framework.overlong import recount, shorten_batch
from framework.preference_objective import build_preference_objective, describe_figures
from framework.trainer import Trainer
from rollout.types import Sample, StepBatch


@dataclass(frozen=True, kw_only=True)
class Packed:
    """This rank's part of one batch, ready to be trained on."""

    answers: list[Microbatch]
    desirable: list[bool]
    """By index into the batch."""
    num_units: int
    """Pairs, or labelled answers, of the global batch."""
    margins: dict[int, float]
    """Of this rank's samples: by how much a chosen answer is better, where the data say so."""
    kl: float = 0.0
    """Where answers are labelled one by one: policy against reference, before this update."""


class PreferenceTrainer(Trainer):
    """The loop of Trainer with another step: whole answers are compared, nothing is sampled.

    A batch holds two samples a unit. Paired losses: the chosen and the rejected answer, always in
    one micro-batch. Labelled ones: the answer, then an unrelated answer to the same prompt, which
    only serves to estimate how far the policy is from the reference.
    """

    def __post_init__(self) -> None:
        self.preference = build_preference_objective(self.config)
        self.paired, self.needs_reference = self.preference.paired, self.preference.reference
        self.prepare(temperature=1.0)
        self._held_out: Packed | None = None

    def train_step(self, batch: StepBatch) -> dict[str, float]:
        """Train on one batch; returns its figures, the same on every rank."""
        packed = self.load(batch)
        lr = self.learning_rate(batch.step)
        reports, grad_norm = self.runner.optimize(packed.answers, self.evaluation(packed), lr)
        totals = sum_figures(reports, self.mesh)
        figures = {f"train/{name}": value for name, value in describe_figures(totals).items()}
        if not self.paired:
            figures["train/kl_estimate"] = packed.kl
        return {
            **figures,
            "train/tokens": totals["tokens"],
            "train/grad_norm": grad_norm,
            "train/lr": lr,
            "train/num_microbatches": float(len(packed.answers)),
        }

    def evaluate(self, version: int, due: bool) -> None:
        """Measure on held-out pairs where it is due: no engine is needed; a collective."""
        if not due:
            return
        if self._held_out is None or not self.paired:  # the policy's KL moves
            self._held_out = self.load(self.source.take(HELD_OUT))
        reports = self.runner.measure(self._held_out.answers, self.evaluation(self._held_out))
        means = describe_figures(sum_figures(reports, self.mesh))
        self.log(version, {f"eval/{name}": value for name, value in means.items()})

    def load(self, batch: StepBatch) -> Packed:
        """Plan, fetch and pack a batch; the reference's log-probs, once."""
        batch, lost = self.shorten(batch)
        answers, unrelated = self.plan_answers(batch)
        samples = self.fetch(batch, [*answers, *unrelated], shortened=lost)
        batch = recount(batch, lost, samples)
        packed = [self.pack_answers(plan, samples) for plan in (*answers, *unrelated)]
        if self.needs_reference:
            if unrelated:
                self.runner.logprobs(packed[1])
            assert self.reference is not None
            with self.reference.swapped_in():
                for microbatches in packed:
                    self.runner.logprobs(microbatches, of_reference=True)
        return Packed(
            answers=packed[0],
            desirable=self.labels(batch),
            num_units=len(batch.samples) // 2,
            margins={i: sample.rewards.get("margin", 0.0) for i, sample in samples.items()},
            kl=self.kl_estimate(packed[1]) if unrelated else 0.0,
        )

    def labels(self, batch: StepBatch) -> list[bool]:
        """What is called good: the first of a pair; or what has a reward of at least 1."""
        if self.paired:
            return [i % 2 == 0 for i in range(len(batch.samples))]
        return [info.reward >= 1 for info in batch.samples]

    def shorten(self, batch: StepBatch) -> tuple[StepBatch, dict[int, int]]:
        """batch.overlong=truncate: each sample of a pair may have half of the budget."""
        if self.config.batch.overlong == "refuse":
            return batch, {}
        budget = self.config.batch.max_tokens_per_microbatch // (1 + self.paired)
        return shorten_batch(batch, budget // self.length_multiple * self.length_multiple)

    def plan_answers(self, batch: StepBatch) -> tuple[list[UpdatePlan], list[UpdatePlan]]:
        """Who trains what, and who scores which unrelated answers; the same on every rank."""
        lengths = [info.prompt_length + info.response_length for info in batch.samples]
        layout = self.mesh.layout
        shape: dict[str, Any] = {
            "dp": layout.dp,
            "max_tokens": self.config.batch.max_tokens_per_microbatch,
            "length_multiple": self.length_multiple,
            "microbatch_multiple": layout.pp if layout.vpp > 1 else 1,
            "pipelined": layout.pp > 1,
            "cost": self.flops,
        }
        if self.paired:
            return [plan_pairs(lengths, **shape)], []
        plans = []
        for first in (0, 1):
            (plan,) = plan_step(lengths[first::2], **shape)
            places = [[[2 * i + first for i in bin_] for bin_ in dp] for dp in plan.microbatches]
            plans.append([UpdatePlan(places)])
        return plans[0], plans[1]

    def pack_answers(self, plan: UpdatePlan, samples: dict[int, Sample]) -> list[Microbatch]:
        """This rank's micro-batches; tokens have no advantages and no weights of their own."""
        ones = {i: torch.ones(1).expand(sample.response_length) for i, sample in samples.items()}
        weights = dict.fromkeys(samples, 1.0)
        split = self.config.parallel.sequence_parallel
        grain = token_grain(self.config.model)
        return [
            pack_microbatch(indices, samples, ones, weights, self.mesh, split, token_grain=grain)
            for indices in plan.microbatches[self.mesh.coords.dp]
        ]

    def evaluation(self, packed: Packed) -> Evaluate:
        """The loss of a micro-batch as the step runner wants it."""

        def evaluate(batch: Microbatch, output: torch.Tensor) -> Any:
            answers = self.answers(batch, output[0])
            labels = [packed.desirable[i] for i in batch.samples]
            total, figures = self.preference(answers, labels, packed.kl)
            # Every context-parallel rank computed them, and all of these are added up.
            share = {name: value / self.mesh.layout.cp for name, value in figures.items()}
            return (total / packed.num_units).float(), no_tokens(), share

        return evaluate

    def answers(self, batch: Microbatch, logprobs: torch.Tensor) -> Answers:
        """The samples of a micro-batch, in its order, without the padding at its end."""
        sequences, count = self.runner.sequences(batch), len(batch.samples)
        ref = batch.ref_logprobs
        return Answers(
            logprobs=sequences.totals(logprobs)[:count],
            num_tokens=sequences.totals(torch.ones_like(batch.loss_mask))[:count],
            ref_logprobs=None if ref is None else sequences.totals(ref)[:count],
        )

    def kl_estimate(self, unrelated: Sequence[Microbatch]) -> float:
        """max(0, mean log-ratio of the unrelated answers of the global batch); a collective."""
        sums = torch.zeros(2, dtype=torch.float64)
        if self.mesh.reports:
            for batch in unrelated:
                assert batch.old_logprobs is not None
                ratios = self.answers(batch, batch.old_logprobs).log_ratios
                sums += torch.tensor([float(ratios.sum()), len(ratios)], dtype=torch.float64)
        dist.all_reduce(sums)
        return max(0.0, float(sums[0] / sums[1].clamp(min=1)))
