"""What a batch is trained by: the configured advantage, loss, correction and aggregation as one."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from framework.advantage_tables import RETURNS, VALUED, advantage_table
from framework.algorithm.advantages import ADVANTAGES
from framework.algorithm.aggregation import token_weights
from framework.algorithm.corrections import CORRECTIONS
from framework.algorithm.inputs import (
    AdvantageInputs,
    CorrectionOutput,
    LossInputs,
    LossOutput,
    Turns,
)
from framework.algorithm.kl import KL_ESTIMATORS
from framework.algorithm.losses import LOSSES
from framework.algorithm.proximal import PROXIMALS
from framework.algorithm.rows import Selection
from framework.algorithm.tokens import TOKEN_ADVANTAGES
from framework.algorithm.tokens.inputs import ScoredTokens
from framework.algorithm_rows import find_row
from framework.config import RunConfig
from rollout.types import Sample, SampleInfo, StepBatch


@dataclass(frozen=True, kw_only=True)
class Objective:
    """All of it bound to its knobs; pure."""

    advantage: Callable[[AdvantageInputs], list[torch.Tensor]] | None
    """None: nothing is compared, every advantage is 1 (stage=sft) or will come from rewards of
    tokens (framework.megatron.credit)."""
    loss: Callable[[LossInputs], LossOutput]
    correction: Callable[[LossInputs], CorrectionOutput] | None
    kl: Callable[[LossInputs], torch.Tensor] | None
    """Divergence from the reference; its inputs then hold ref_logprobs."""
    kl_coef: float
    entropy_coef: float
    aggregation: str
    max_length: int
    proximal: Callable[[LossInputs], torch.Tensor] | None = None
    """What stands in for the trainer's own old_logprobs; None: they do."""
    token_advantage: Callable[[ScoredTokens], torch.Tensor] | None = None
    """In place of `advantage`: from what is known of each token."""
    selection: Selection | None = None
    """Tokens of the whole update that the loss treats apart."""
    teacher_top_k: int = 0
    """How many of a teacher's likeliest tokens the loss is given at each position."""

    def advantages(self, batch: StepBatch, mine: Mapping[int, Sample]) -> list[torch.Tensor]:
        """[R] for every sample of the batch, from metadata alone; with token_advantage those of
        this rank's own samples, by index, and zeros for the others.
        """
        infos = batch.samples
        if self.token_advantage is not None:
            return [
                self.token_advantage(scored_tokens(mine[i]))
                if i in mine
                else torch.zeros(1).expand(info.response_length)
                for i, info in enumerate(infos)
            ]
        if self.advantage is None:
            return [torch.ones(1).expand(info.response_length) for info in infos]
        # A failed sample has no token to train and no reward to compare the others with.
        counted = [i for i, info in enumerate(infos) if info.num_loss_tokens]
        found = [torch.zeros(1).expand(info.response_length) for info in infos]
        if not counted:
            return found
        values = self.advantage(advantage_inputs([infos[i] for i in counted]))
        for i, advantage in zip(counted, values, strict=True):
            found[i] = advantage
        return found

    def weights(self, num_loss_tokens: dict[int, int]) -> dict[int, float]:
        """The weight of a policy token of each sample in the loss of one update.

        Args:
            num_loss_tokens: of every sample of the update, on whatever rank it is.
        """
        total = sum(num_loss_tokens.values())
        sequences = sum(1 for count in num_loss_tokens.values() if count)
        return {
            i: token_weights(
                self.aggregation,
                num_loss_tokens=count,
                global_tokens=total,
                global_sequences=sequences,
                max_length=self.max_length,
            )
            for i, count in num_loss_tokens.items()
        }

    def __call__(self, inputs: LossInputs) -> LossOutput:
        """The loss of each token, corrected, with KL and entropy terms; [T] unreduced."""
        inputs = _written(inputs)
        log_ratio = (inputs.old_logprobs - inputs.rollout_logprobs).detach()
        if self.proximal is not None:
            inputs = replace(inputs, old_logprobs=self.proximal(inputs))
        output = self.loss(inputs)
        value, metrics = output.loss, dict(output.metrics)
        if self.correction is not None:
            corrected = self.correction(inputs)
            # KL(engine || trainer) on the engine's samples, by the k3 estimator.
            metrics |= {"rollout_kl": log_ratio.exp() - 1 - log_ratio, **corrected.metrics}
            value = value * corrected.weights
        if self.kl is not None:
            divergence = self.kl(inputs)
            metrics["reference_kl"] = divergence.detach()
            value = value + self.kl_coef * divergence
        if self.entropy_coef:
            value = value - self.entropy_coef * inputs.entropy
        return LossOutput(loss=value, metrics=metrics)


def _written(inputs: LossInputs) -> LossInputs:
    """0 for every log-prob of a token that the policy did not write.

    Their weight is 0 anyway, but nobody trains them: the policy may have left the reference so far
    at a prompt's token that exp of the difference is infinite, and 0 times that is no number.
    """
    written = inputs.loss_mask > 0

    def kept(logprobs: torch.Tensor) -> torch.Tensor:
        return torch.where(written, logprobs, 0.0)

    return replace(
        inputs,
        policy_logprobs=kept(inputs.policy_logprobs),
        old_logprobs=kept(inputs.old_logprobs),
        rollout_logprobs=kept(inputs.rollout_logprobs),
        ref_logprobs=None if inputs.ref_logprobs is None else kept(inputs.ref_logprobs),
    )


def scored_tokens(sample: Sample) -> ScoredTokens:
    """What is known of each token of a response.

    Raises:
        ValueError: no teacher has scored it.
    """
    if sample.teacher_logprobs is None:
        raise ValueError(
            f"sample {sample.group_id}/{sample.index} has no teacher_logprobs, which "
            "algorithm.advantage compares with; rollout.teacher was empty when it was generated"
        )
    return ScoredTokens(
        rollout_logprobs=torch.from_numpy(sample.rollout_logprobs.copy()),
        teacher_logprobs=torch.from_numpy(sample.teacher_logprobs.copy()),
        loss_mask=torch.from_numpy(sample.loss_mask.astype("float32")),
    )


def advantage_inputs(infos: Sequence[SampleInfo]) -> AdvantageInputs:
    """What estimators see of samples, each with at least one policy token."""
    names = sorted({name for info in infos for name in info.rewards})
    baselines = [info.baseline_reward for info in infos]
    return AdvantageInputs(
        rewards=torch.tensor([info.reward for info in infos]),
        group_ids=torch.tensor([info.group_id for info in infos]),
        response_lengths=[info.response_length for info in infos],
        num_loss_tokens=[info.num_loss_tokens for info in infos],
        components={
            name: torch.tensor([info.rewards.get(name, math.nan) for info in infos])
            for name in names
        },
        baselines=None if None in baselines else torch.tensor(baselines),
        turns=_turns(infos),
    )


def _turns(infos: Sequence[SampleInfo]) -> list[Turns] | None:
    if not all(info.turn_states for info in infos):
        return None
    return [
        Turns(starts=info.turn_starts, states=info.turn_states, rewards=info.turn_rewards)
        for info in infos
    ]


def build_objective(config: RunConfig) -> Objective:
    """The objective of a run: of its algorithm, or of supervised training."""
    algorithm = config.algorithm
    max_length = config.rollout.sampling.max_new_tokens
    if config.stage == "sft":
        return Objective(
            advantage=None,
            loss=LOSSES["negative_log_likelihood"].bind({}),
            correction=None,
            kl=None,
            kl_coef=0.0,
            entropy_coef=0.0,
            aggregation="token_mean",
            max_length=max_length,
        )
    # Those of a critic or of returns come later, those of tokens from other inputs.
    by_token = TOKEN_ADVANTAGES.get(algorithm.advantage)
    later = advantage_table(algorithm.advantage) in (VALUED, RETURNS)
    other = later or by_token is not None
    advantage = None if other else find_row(ADVANTAGES, algorithm.advantage, "advantages")
    loss = find_row(LOSSES, algorithm.loss, "loss")
    correction = find_row(CORRECTIONS, algorithm.correction, "weights")
    return Objective(
        advantage=advantage.bind(algorithm.advantage_args) if advantage else None,
        loss=loss.bind(algorithm.loss_args),
        correction=correction.bind(algorithm.correction_args),
        kl=KL_ESTIMATORS[algorithm.kl_estimator] if algorithm.kl_coef else None,
        kl_coef=algorithm.kl_coef,
        entropy_coef=algorithm.entropy_coef,
        aggregation=algorithm.aggregation,
        max_length=max_length,
        proximal=(
            None if algorithm.old_logprobs == "trainer" else PROXIMALS[algorithm.old_logprobs]
        ),
        token_advantage=by_token.bind(algorithm.advantage_args) if by_token else None,
        selection=loss.bind_selection(algorithm.loss_args),
        teacher_top_k=config.rollout.teacher_top_k,  # refused of our losses that use none
    )


def effective_sample_fraction(figures: dict[str, float]) -> dict[str, float]:
    """(mean w)^2 / mean w^2 of a correction's weights: 1 where all weigh alike; else no figure."""
    squared = figures.get("train/correction_weight_squared", 0.0)
    if not squared:
        return {}
    return {"train/effective_sample_fraction": figures["train/correction_weight"] ** 2 / squared}
