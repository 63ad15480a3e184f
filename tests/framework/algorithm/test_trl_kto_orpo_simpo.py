"""SimPO, ORPO and KTO against TRL's trainers, value and gradient: to 1e-6.

See test_trl_agreement.py. TRL's `CPOTrainer` and `ORPOTrainer` compute everything from a model's
logits, which stand for it here; `KTOTrainer` is given log-probs of tokens. Where TRL's differs:

- ORPO: its likelihood term is the mean over all chosen tokens of the batch, prompts included; the
  paper's, and ours, is each chosen answer's own mean. They are the same where answers are equally
  long and the prompt is one token, which nobody predicts. Its odds are computed in fp32.
- SimPO: beta (r_c - r_r - gamma / beta), which is the paper's beta (r_c - r_r) - gamma.
- KTO: its z is a mean over the answers of a device, then over the devices; the paper's is that of
  the micro-batch, ours that of the global batch.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from framework.algorithm.preference import PREFERENCE_LOSSES
from framework.algorithm.preference.inputs import Answers, LabelledInputs, PairInputs

orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="TRL is not installed")
cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer", reason="TRL is not installed")
kto = pytest.importorskip("trl.trainer.kto_trainer", reason="TRL is not installed")
pytestmark = pytest.mark.nightly  # TRL imports for half a minute

PAIRS, LONGEST, VOCABULARY = 4, 9, 13
ALONE = SimpleNamespace(
    device="cpu", gather=lambda values: values, gather_for_metrics=lambda values: values
)
SHARED = {
    "accelerator": ALONE,
    "is_encoder_decoder": False,
    "padding_value": 0,
    "pad_token_id": 0,
    "aux_loss_enabled": False,
}


def trainer_of(cls: Any, **attributes: Any) -> Any:
    """One that was never set up: with what its loss reads."""
    found = object.__new__(cls)
    for name, value in (SHARED | attributes).items():
        setattr(found, name, value)
    return found


def pairs(seed: int, *, alike: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [2 N, 1 + T, V], token ids [2 N, 1 + T] and how long each answer is, [2 N]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * PAIRS, 1 + LONGEST)
    logits = torch.randn((*shape, VOCABULARY), generator=generator, dtype=torch.float64)
    ids = torch.randint(0, VOCABULARY, shape, generator=generator)
    lengths = torch.randint(1, LONGEST + 1, shape[:1], generator=generator)
    return logits, ids, torch.full_like(lengths, LONGEST) if alike else lengths


def loss_of_pairs(name: str, knobs: dict[str, float], logits, ids, lengths) -> torch.Tensor:
    """Ours."""
    logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    mask = torch.arange(LONGEST) < lengths[:, None]
    sums = (logprobs * mask).sum(1)
    chosen, rejected = (
        Answers(logprobs=part, num_tokens=count.double())
        for part, count in zip(sums.chunk(2), lengths.chunk(2), strict=True)
    )
    row = PREFERENCE_LOSSES[name]
    return row.function(
        PairInputs(chosen=chosen, rejected=rejected), row.config(**knobs)
    ).loss.mean()


def trl_batch(ids: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
    there = torch.arange(1 + LONGEST) <= lengths[:, None]
    labels = ids.masked_fill(~there, -100)
    labels[:, 0] = -100  # the prompt
    parts = {"input_ids": ids * there, "attention_mask": there.long(), "labels": labels}
    return {
        f"{side}_{name}": half
        for name, values in parts.items()
        for side, half in zip(("chosen", "rejected"), values.chunk(2), strict=True)
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_of_pairs_are_trls(name: str, seed: int) -> None:
    logits, ids, lengths = pairs(seed, alike=name == "orpo")
    found, wanted = (logits.clone().requires_grad_() for _ in "xx")
    if name == "simpo":
        knobs = {"beta": 2.0, "gamma": 0.7}
        itself = trainer_of(
            cpo.CPOTrainer,
            loss_type="simpo",
            beta=2.0,
            simpo_gamma=0.7,
            alpha=0.0,
            cpo_alpha=0.0,
            label_smoothing=0.0,
        )
    else:
        knobs = {"beta": 0.3}
        itself = trainer_of(orpo.ORPOTrainer, beta=0.3)
    value = loss_of_pairs(name, knobs, found, ids, lengths)

    def model(*_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=wanted)

    expected, _ = itself.get_batch_loss_metrics(model, trl_batch(ids, lengths))
    compare(value, expected, found, wanted)


@pytest.mark.parametrize("shift", [-0.4, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_kto_is_trls(seed: int, shift: float) -> None:
    """Where the estimate of the divergence is positive, and where it is cut off at 0."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * PAIRS, LONGEST)
    policy, ref, other, ref_other = (
        -torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(4)
    )
    other = ref_other + shift / LONGEST + 0.01 * other
    desirable = torch.tensor([True, False, True, True, False, True, False, False])
    found, wanted = (policy.clone().requires_grad_() for _ in "xx")
    kl = max(0.0, (other - ref_other).sum(1).mean().item())
    assert (kl > 0) == (shift > 0)
    row = PREFERENCE_LOSSES["kto"]
    knobs = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    answers = Answers(
        logprobs=found.sum(1),
        num_tokens=torch.full((2 * PAIRS,), float(LONGEST), dtype=torch.float64),
        ref_logprobs=ref.sum(1),
    )
    inputs = LabelledInputs(answers=answers, desirable=desirable, kl=kl)
    value = row.function(inputs, row.config(**knobs)).loss.mean()
    itself = trainer_of(
        kto.KTOTrainer,
        **knobs,
        loss_type="kto",
        calculate_KL=True,
        precompute_ref_logps=True,
        model=SimpleNamespace(training=False),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
    )
    nothing = torch.zeros(shape)

    def model(labels: torch.Tensor, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        logprobs = other if input_ids[0, 0] else wanted
        return SimpleNamespace(log_probs=logprobs, entropy=nothing, mean_logits=nothing)

    ids = torch.zeros((2 * PAIRS, 1 + LONGEST), dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    expected = itself._compute_loss(
        model,
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "completion_mask": mask,
            "KL_input_ids": ids + 1,
            "KL_attention_mask": torch.ones_like(ids),
            "KL_completion_mask": mask,
            "label": desirable,
            "ref_logps": ref.sum(1),
            "ref_KL_logps": ref_other.sum(1),
        },
        False,
    )
    compare(value, expected, found, wanted)


def compare(value, expected, found, wanted) -> None:
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    assert wanted.grad.abs().max() > 1e-3
    assert (found.grad - wanted.grad).abs().max() <= 1e-6
