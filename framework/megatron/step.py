"""Forward passes and updates: micro-batches in, log-probs or a trained policy and figures out."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from framework.algorithm.inputs import LossInputs, LossOutput, Sequences, TeacherTop
from framework.megatron.figures import figures_of, reduce_figures
from framework.megatron.logprobs import LogprobContext, logprob_output_processor
from framework.megatron.microbatch import Microbatch
from framework.megatron.model import Policy
from framework.megatron.mtp import MtpLoss
from framework.megatron.parallel import Mesh
from framework.megatron.routing_replay import RoutingReplay
from framework.megatron.score_head import score_output_processor
from megatron_bridge.models.score_head import has_score_head

LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]
Evaluate = Callable[[Microbatch, torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]
"""(micro-batch, the model's output) -> loss, no_tokens(), figures."""


@dataclass
class StepRunner:
    """Runs micro-batches through one policy."""

    policy: Policy
    mesh: Mesh
    temperature: float
    logits_chunk_tokens: int
    routing: RoutingReplay | None = None
    """Of a policy with routers."""
    mtp_loss: MtpLoss | None = field(init=False, default=None)
    """Of a policy with multi-token prediction layers."""

    def __post_init__(self) -> None:
        if self.policy.config.mtp_num_layers:
            self.mtp_loss = MtpLoss(self.policy, self.mesh)

    def _run(
        self,
        microbatches: list[Microbatch],
        loss_function: Evaluate,
        forward_only: bool,
    ) -> list[dict[str, Any]]:
        """megatron-core's schedule over the micro-batches.

        Returns what loss_function reported for each, in order; empty except on the last stage.
        """
        context = LogprobContext(
            self.temperature,
            self.policy.vocab_size,
            self.mesh.tp_group,
            self.logits_chunk_tokens,
        )

        scored = has_score_head(self.policy.hf_config)
        processor = score_output_processor if scored else logprob_output_processor

        def forward_step(
            batches: Iterator[Microbatch], model: torch.nn.Module
        ) -> tuple[torch.Tensor, LossFunction]:
            batch = next(batches)
            if self.mtp_loss is not None:
                self.mtp_loss.forward(batch)
            with self.routing.forward(batch) if self.routing else contextlib.nullcontext():
                output = model(
                    batch.tokens[None],
                    batch.position_ids[None],
                    None,
                    labels=batch.labels[None],
                    packed_seq_params=batch.packed_seq_params,
                    output_processor=processor,
                    # Passes without a gradient have no use for the teacher's tokens.
                    output_processor_context=replace(
                        context, top_ids=None if forward_only else batch.teacher_ids
                    ),
                )
            return output, functools.partial(loss_function, batch)

        models: list[Any] = list(self.policy.wrapped)
        # Every virtual stage walks the same micro-batches with an iterator of its own.
        iterators = [iter(microbatches) for _ in models]
        single = len(models) == 1
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators[0] if single else iterators,
            model=models[0] if single else models,
            num_microbatches=len(microbatches),
            seq_length=max(len(batch.tokens) for batch in microbatches),
            micro_batch_size=1,
            forward_only=forward_only,
        )

    def sequences(self, batch: Microbatch) -> Sequences:
        """Which of this rank's positions belong to one sequence."""
        return Sequences(
            ids=batch.sequence_ids,
            count=batch.num_sequences,
            mask=batch.loss_mask,
            add_up=self.mesh.sum_over_cp,
        )

    def logprobs(self, microbatches: list[Microbatch], *, of_reference: bool = False) -> None:
        """Fill `old_logprobs` (or `ref_logprobs`) by a forward pass (last stage only)."""

        def keep(batch: Microbatch, output: torch.Tensor) -> Any:
            return output.sum() * 0, no_tokens(), {"logprobs": output[0].detach()}

        routing = None if of_reference else self.routing  # its weights have routes of their own
        scoring = routing.during(routing.scores()) if routing else contextlib.nullcontext()
        with torch.no_grad(), scoring:
            outputs = self._run(microbatches, keep, forward_only=True)
        for batch, output in zip(microbatches, outputs, strict=self.mesh.is_last_stage):
            if of_reference:
                batch.ref_logprobs = output["logprobs"]
            else:
                batch.old_logprobs = output["logprobs"]

    def update(
        self,
        microbatches: list[Microbatch],
        objective: Callable[[LossInputs], LossOutput],
        lr: float,
    ) -> dict[str, float]:
        """One optimizer step down the objective, [T] per token, weighted as the micro-batches say.

        Where a micro-batch has no old_logprobs the policy's own stand in: exact for the first
        update on a batch, before which the policy is the old policy.

        Returns:
            Figures of the global batch, the same on every rank: train/loss, train/entropy,
            train/grad_norm, train/rollout_logprob_abs_diff_{max,mean}, and the loss's own.

        Raises:
            FloatingPointError: the gradient norm is not finite.
        """

        def evaluate(batch: Microbatch, output: torch.Tensor) -> Any:
            logprobs, entropy = output[:2]
            old = batch.old_logprobs if batch.old_logprobs is not None else logprobs.detach()
            result = objective(
                LossInputs(
                    policy_logprobs=logprobs,
                    old_logprobs=old,
                    rollout_logprobs=batch.rollout_logprobs,
                    ref_logprobs=batch.ref_logprobs,
                    advantages=batch.advantages,
                    loss_mask=batch.loss_mask,
                    entropy=entropy,
                    sequences=self.sequences(batch),
                    staleness=batch.staleness,
                    selected=batch.selected,
                    teacher=_teacher_top(batch, output),
                )
            )
            total = (result.loss * batch.weights).sum()
            figures = figures_of(batch, total, logprobs, entropy, result.metrics)
            return total, no_tokens(), figures

        routing = self.routing
        with routing.during(routing.updates()) if routing else contextlib.nullcontext():
            reports, grad_norm = self.optimize(microbatches, evaluate, lr)
        figures = {**reduce_figures(reports, self.mesh), "train/grad_norm": grad_norm}
        if self.mtp_loss is not None:
            figures |= self.mtp_loss.take_figures()
        return figures | routing.take_figures() if routing else figures

    def optimize(
        self, microbatches: list[Microbatch], evaluate: Evaluate, lr: float
    ) -> tuple[list[dict[str, Any]], float]:
        """One optimizer step down the sum of what `evaluate` returns for each micro-batch.

        Returns:
            Its reports in order (empty except on the last stage), and the gradient's norm.

        Raises:
            FloatingPointError: the gradient norm is not finite.
        """
        check_teacher_ids(microbatches, self.policy.vocab_size)
        for model in self.policy.wrapped:
            model.zero_grad_buffer()
        self.policy.optimizer.zero_grad()
        self.policy.set_learning_rate(lr)
        if self.mtp_loss is not None:
            self.mtp_loss.begin(microbatches)
        reports = self._run(microbatches, evaluate, forward_only=False)
        outcome: Any = self.policy.optimizer.step()  # (succeeded, gradient norm, zero gradients)
        grad_norm = float(outcome[1])
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"train/grad_norm is {grad_norm}; the update is not usable")
        return reports, grad_norm

    def measure(self, microbatches: list[Microbatch], evaluate: Evaluate) -> list[dict[str, Any]]:
        """The reports of `evaluate` without a gradient; empty except on the last stage."""
        with torch.no_grad():
            return self._run(microbatches, evaluate, forward_only=True)


def no_tokens() -> torch.Tensor:
    """The count of tokens that megatron's schedule wants of a loss function."""
    # megatron divides by this count when asked to; we have divided already (see model.py).
    return torch.zeros((), dtype=torch.int, device=torch.cuda.current_device())


def check_teacher_ids(microbatches: list[Microbatch], vocab_size: int) -> None:
    """ValueError where a teacher names a token that the policy does not have."""
    for batch in microbatches:
        if (
            batch.teacher_ids is not None
            and (largest := int(batch.teacher_ids.max())) >= vocab_size
        ):
            raise ValueError(
                f"rollout.teacher names token {largest}; the policy has {vocab_size}: another "
                "vocabulary"
            )


def _teacher_top(batch: Microbatch, output: torch.Tensor) -> TeacherTop | None:
    """What the output says of the tokens that a teacher named, [2 + k + 1, T]."""
    if batch.teacher_logprobs is None:
        return None
    return TeacherTop(
        teacher_logprobs=batch.teacher_logprobs,
        policy_logprobs=output[2:-1],
        policy_rest=output[-1],
    )
