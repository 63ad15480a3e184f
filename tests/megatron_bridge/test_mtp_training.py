"""The loss of multi-token prediction and its gradient, against autograd through the reference.

The gradient of all that a layer has: projection, norms and the decoder layer's own tensors.
"""

from functools import partial

import numpy as np
import pytest
import torch
from bridge_models import TOKENS, random_model
from mtp_models import save_with_mtp
from safetensors.torch import load_file

from framework.algorithm.inputs import LossOutput
from framework.config import ModelConfig, OptimizerConfig, RunConfig
from megatron_bridge.mapping import hf_shapes, rank_views
from megatron_bridge.models.architecture import Spec
from megatron_bridge.views import copy_out
from rollout.types import Sample
from tests.forked_ranks import run_ranks

PROMPTS = (6, 1)
"""Of each sample: behind a prompt of one token not every depth tells the first answer tokens."""
FACTOR = 0.3
TOLERANCE = 1e-5
"""Largest difference of a gradient over its largest element, fp32, through two decoder layers."""


def sample(index):
    """A row of TOKENS, some of whose response tokens are not the policy's."""
    tokens, prompt = TOKENS[index].numpy().astype(np.int32), PROMPTS[index]
    mask = np.ones(len(tokens) - prompt, dtype=np.uint8)
    mask[3 + index] = 0
    return Sample(
        group_id=0,
        index=index,
        tokens=tokens,
        prompt_length=prompt,
        loss_mask=mask,
        rollout_logprobs=np.zeros(len(mask), dtype=np.float32),
        versions=np.where(mask, 0, -1).astype(np.int32),
        turn_starts=np.array([0], dtype=np.int32),
        reward=0.0,
    )


def train(root, rank):
    """One update without a policy gradient; leaves the loss and the heads' gradients."""
    from framework.megatron.microbatch import pack_microbatch
    from framework.megatron.parallel import start_mesh, stop_mesh
    from framework.megatron.routing_replay import RoutingReplay
    from framework.megatron.step import StepRunner
    from framework.train import build_models

    config = RunConfig(
        mode="train_only",
        model=ModelConfig(
            hf_path=str(root / "hf"), mtp=True, megatron={"mtp_loss_scaling_factor": FACTOR}
        ),
        optimizer=OptimizerConfig(lr=0.0, clip_grad=1e9),
    )
    mesh = start_mesh(config.parallel, config.seed)
    policy, _ = build_models(config, mesh, None)
    runner = StepRunner(policy, mesh, 1.0, 1 << 20, RoutingReplay(policy, "none"))
    samples = {index: sample(index) for index in (0, 1)}
    batches = [
        pack_microbatch(
            [index],
            samples,
            {index: torch.zeros(len(samples[index].loss_mask))},
            {index: 1.0},
            mesh,
            False,
        )
        for index in samples
    ]

    def nothing(inputs):
        return LossOutput(loss=inputs.policy_logprobs * 0, metrics={})

    figures = runner.update(batches, nothing, 0.0)
    gradients = {}
    shapes = hf_shapes(policy.hf_config)
    views = rank_views(
        policy.hf_config, mesh.layout, mesh.coords, Spec.TORCH, config.model.vocab_pad_multiple
    )
    for name, parameter in policy.chunks[0].named_parameters():
        if name.startswith("mtp."):
            view = views[0, name]
            gradients |= {box.name: torch.zeros(shapes[box.name]) for box in view.boxes}
            copy_out(view, parameter.main_grad, gradients)
    rest = [
        parameter.main_grad.abs().max().item()
        for name, parameter in policy.chunks[0].named_parameters()
        if not name.startswith("mtp.")
    ]
    found = [figures[f"train/mtp_{name}"] for name in ("loss", "accuracy")]
    torch.save((found, gradients, max(rest)), root / "found")
    stop_mesh()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What the trainer finds, and the loss and the gradients of the reference."""
    root = tmp_path_factory.mktemp("mtp")
    model, depths = random_model("deepseek_v3_mtp")
    reference = save_with_mtp(model, root / "hf", depths)
    run_ranks("mtp", 1, partial(train, root), root, 120.0)
    model.requires_grad_(False)
    for layer, own in zip(reference.layers, reference.own, strict=True):
        layer.requires_grad_()
        for tensor in own.values():
            tensor.requires_grad_()
    masks = torch.zeros(TOKENS.shape)
    for index in (0, 1):
        masks[index, PROMPTS[index] :] = torch.from_numpy(sample(index).loss_mask).float()
    masks[:, : depths + 1] = 0  # which the last depth cannot tell
    loss, right = torch.zeros(()), torch.zeros(())
    for depth, logits in enumerate(reference.logits(TOKENS)[1:], 1):
        # Position i tells token i + 1 + depth.
        later, mask = TOKENS[:, depth + 1 :], masks[:, depth + 1 :]
        told = logits[:, :-1].log_softmax(-1).gather(-1, later[..., None])[..., 0]
        right += ((logits[:, :-1].argmax(-1) == later) * mask).sum() / masks.sum() / depths
        loss = loss - (told * mask).sum() / masks.sum() / depths
    (FACTOR * loss).backward()
    wanted = reference_gradients(reference, root / "gradients")
    return torch.load(root / "found"), [loss.item(), right.item()], wanted


def reference_gradients(reference, path):
    """By the names on disk: transformers saves the decoder layers' gradients as if weights."""
    model, main = reference.model, len(reference.model.model.layers)
    model.model.layers.extend(reference.layers)
    model.config.num_hidden_layers = len(model.model.layers)
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model.save_pretrained(path)
    later = tuple(f"model.layers.{main + depth}." for depth in range(len(reference.layers)))
    found = {
        name: gradient
        for name, gradient in load_file(path / "model.safetensors").items()
        if name.startswith(later) and "e_score_correction_bias" not in name  # no gradient trains it
    }
    for prefix, own in zip(later, reference.own, strict=True):
        found |= {f"{prefix}{name}.weight": tensor.grad for name, tensor in own.items()}
    return found


def test_the_loss_is_that_of_the_formula(outcome):
    (found, _, _), wanted, _ = outcome
    assert found == pytest.approx(wanted, rel=2e-6)


def test_its_gradient_is_that_of_autograd(outcome):
    (_, gradients, _), _, wanted = outcome
    assert gradients.keys() == wanted.keys()
    assert {"eh_proj.weight", "mlp.gate.weight", "self_attn.o_proj.weight"} <= {
        name.split(".", 3)[3] for name in wanted
    }
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).abs().max() <= TOLERANCE * gradient.abs().max(), name


def test_another_megatron_core_is_refused(monkeypatch):
    from framework.megatron.mtp import check_megatron

    check_megatron()
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.20.0")
    with pytest.raises(
        RuntimeError, match=r"megatron-core 0\.20\.0 is installed.*model\.mtp=false"
    ):
        check_megatron()


def test_a_guess_is_right_where_no_real_token_is_likelier():
    from framework.megatron.mtp import is_likeliest

    class Alone:
        def rank(self):
            return 0

        def size(self):
            return 1

    logits = torch.tensor([[1.0, 3.0, 9.0], [2.0, 1.0, 0.0], [0.0, -1.0, 5.0]])
    right = is_likeliest(logits, torch.tensor([1, 1, 0]), 2, Alone())  # the third row is padding
    assert right.tolist() == [True, False, True]


def test_none_of_it_reaches_the_policy(outcome):
    (_, _, rest), _, _ = outcome
    assert rest == 0.0
