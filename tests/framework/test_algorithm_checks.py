"""Broken choices of an algorithm, and a loss of the user's own by its module's name."""

from pathlib import Path

import pytest
import torch

from framework.algorithm.inputs import LossInputs, Sequences
from framework.checks import check_config
from framework.compose import compose_config
from framework.objective import build_objective

BROKEN = [
    (["algorithm.loss=ppo"], "algorithm.loss=ppo: did you mean ppo_clip? must be one of"),
    (
        ["algorithm.advantage=reverse_kll"],
        "=reverse_kll: did you mean reverse_kl? must be one",
    ),
    (["algorithm.advantage=gaee"], "algorithm.advantage=gaee: did you mean gae? must be one of gr"),
    (
        ["algorithm.advantage=nosuch"],
        "group_in_group, gae, bi_level_gae, discounted_return, reverse_kl, or package.module",
    ),
    (["algorithm.correction=tis"], "algorithm.correction=tis: must be one of none, token"),
    (["algorithm.advantage_args.std_eps=0"], "algorithm.advantage_args.std_eps=0: must be greater"),
    (["algorithm.loss_args.clip_lo=0.1"], "has no such knob; did you mean clip_low?"),
    (
        ["algorithm.loss=gmpo", "algorithm.loss_args.clip_low=0.2"],
        "algorithm.loss_args.clip_low=0.2: algorithm.loss has no such knob",
    ),
    (["algorithm.loss_args.clip_low=1.5"], "clip_low=1.5: must be in [0, 1]"),
    (["algorithm.loss_args.clip_high=high"], "clip_high=high: float wanted"),
    (["algorithm.loss_args.clip_high=-1"], "clip_high=-1: a finite number that is not negative"),
    (
        ["algorithm=icepop", "algorithm.correction_args.low=6"],
        "algorithm.correction_args.low=6: above algorithm.correction_args.high=5.0",
    ),
    (["algorithm=icepop", "algorithm.correction_args.mask=1"], "mask=1: bool wanted"),
    (["algorithm=rloo", "rollout.samples_per_prompt=1"], "algorithm.advantage=leave_one_out comp"),
    (["algorithm.advantage=greedy_baseline"], "rollout.greedy_baseline=False: algorithm.advantage"),
    (["rollout.greedy_baseline=true"], "rollout.greedy_baseline=True: algorithm.advantage=group_n"),
    (
        ["algorithm.old_logprobs=engine", "algorithm.recompute_old_logprobs=true"],
        "algorithm.old_logprobs=engine: takes nothing",
    ),
    (["algorithm=tis", "algorithm.old_logprobs=engine"], "algorithm.correction=token: with algo"),
    (["algorithm.old_logprobs=proximal"], "algorithm.old_logprobs=proximal: must be one of"),
    (["algorithm=ppo", "algorithm.loss_args.dual_clip=1"], "dual_clip=1: must be above 1 (0: off)"),
    (
        ["algorithm=sapo", "algorithm.loss_args.temperature_positive=0"],
        "must be greater than 0: th",
    ),
    (
        ["algorithm=clip_cov", "algorithm.loss_args.covariance_low=5"],
        "covariance_low=5: must be below algorithm.loss_args.covariance_high=5.0",
    ),
    (  # the other one is as in the row
        ["algorithm.loss=clip_cov", "algorithm.loss_args={covariance_low: 10}"],
        "covariance_low=10: must be below algorithm.loss_args.covariance_high=5.0",
    ),
    (
        ["algorithm.correction=geometric", "algorithm.correction_args={high: 0.5}"],
        "algorithm.correction_args.low=0.99: above algorithm.correction_args.high=0.5",
    ),
    (["algorithm=gigpo", "algorithm.advantage_args.gamma=2"], "gamma=2: must be in [0, 1]"),
    (["algorithm=clip_cov", "algorithm.loss_args.share=0"], "share=0: must be greater than 0"),
    (["algorithm=kl_cov", "algorithm.loss_args.share=2"], "share=2: a share is at most 1"),
    (
        ["algorithm=gdpo", "+algorithm.advantage_args.weights=3"],
        "algorithm.advantage_args.weights=3: a mapping of names to finite numbers",
    ),
    (["algorithm.loss=negative_log_likelihood"], "ignores every reward"),
    (["algorithm.aggregation=mean"], "algorithm.aggregation=mean"),
    (["critic.lr=0.1"], "critic.lr=0.1: algorithm.advantage=group_normalized has no critic; set"),
    (["algorithm=ppo", "parallel.fsdp=true"], "parallel.fsdp=True: not with a critic"),
    (["algorithm=ppo", "rollout.greedy_baseline=true"], "rollout.greedy_baseline=True"),
    (
        ["algorithm=gdpo", "+algorithm.advantage_args.weights={match: x}"],
        "a mapping of names to finite numbers",
    ),
    (["algorithm=ppo", "critic.value_clip=-1"], "critic.value_clip=-1"),
    (["algorithm=ppo", "critic.policy_starts_at_step=200"], "the policy would never learn"),
    (["algorithm=ppo", "algorithm.advantage_args.lam=1.5"], "lam=1.5: must be in [0, 1]"),
    (["algorithm=ppo", "algorithm.advantage_args.turn_gamma=1"], "turn_gamma=1: algorithm.adv"),
    (["algorithm=ppo", "critic.init_from=/no/such"], "critic.init_from=/no/such"),
    (["algorithm.routing_replay=r3"], "algorithm.routing_replay=r3: must be one of"),
    (
        ["algorithm.routing_replay=old_policy"],
        "algorithm.routing_replay=old_policy: Qwen3ForCausalLM has no experts",
    ),
    (
        ["rollout.engine.return_routes=true"],
        "rollout.engine.return_routes=True: Qwen3ForCausalLM has no experts",
    ),
    (
        ["model=tiny_moe", "algorithm.routing_replay=rollout"],
        "rollout.engine.return_routes=False: with algorithm.routing_replay=rollout samples",
    ),
    (
        ["model=tiny_moe", "algorithm.routing_replay=old_policy", "algorithm.old_logprobs=engine"],
        "algorithm.old_logprobs=engine: saves the pass whose routes",
    ),
    (
        [
            *("model=tiny_moe", "algorithm.routing_replay=old_policy"),
            "+model.megatron.moe_router_fusion=true",
        ],
        "model.megatron.moe_router_fusion=True: the fused router replays nothing",
    ),
    (
        [
            *("model=tiny_moe", "algorithm.routing_replay=old_policy"),
            "+model.megatron.moe_router_load_balancing_type=sinkhorn",
        ],
        "moe_router_load_balancing_type=sinkhorn: such a router replays nothing",
    ),
    (
        ["model=tiny_moe", "algorithm.routing_replay=old_policy", "stage=sft"],
        "stage=sft samples nothing; must be none",
    ),
    (["algorithm.entropy_coef=-0.1"], "algorithm.entropy_coef=-0.1"),
    (["algorithm.kl_coef=-0.1"], "algorithm.kl_coef=-0.1"),
    (
        ["algorithm=ppo", "algorithm.kl_coef=0.1", "algorithm.kl_reward_coef=0.1"],
        "algorithm.kl_reward_coef=0.1: the same divergence would count twice",
    ),
    (
        ["algorithm.kl_reward_coef=0.1"],
        "algorithm.advantage=group_normalized knows no rewards of",
    ),
    (
        ["algorithm=bi_level_gae", "algorithm.kl_reward_coef=0.1"],
        "=bi_level_gae knows no rewards of single tokens; one of gae, discounted_return",
    ),
    (["algorithm=ppo", "algorithm.kl_reward_target=6"], "algorithm.kl_reward_target=6: nothing to"),
    (["algorithm.kl_reward_horizon=0"], "algorithm.kl_reward_horizon=0"),
    (
        ["algorithm=reinforce_pp", "critic.scale_rewards=true"],
        "critic.scale_rewards=True: alg",
    ),
    (["algorithm=reinforce_pp", "algorithm.advantage_args.gamma=2"], "gamma=2: must be in [0, 1]"),
    (["algorithm=grpo_kl", "algorithm.kl_estimator=k1"], "algorithm.kl_estimator=k1"),
    (["algorithm=grpo_kl", "algorithm.reference=/no/such"], "algorithm.reference=/no/such"),
    (["algorithm.reference=/no/such"], "not used while algorithm.kl_coef=0"),
    (["algorithm=grpo_kl", "checkpoint.resume=/no/such"], "name the reference by"),
    (["algorithm.reference_refresh_steps=5"], "not used while algorithm.kl_coef=0"),
    (
        [
            *("algorithm=grpo_kl", "algorithm.reference_refresh_steps=5"),
            "checkpoint.every_steps=8",
        ],
        "checkpoint.every_steps=8: between two refreshes",
    ),
    (["algorithm.loss=no.such.module"], "algorithm.loss=no.such.module: No module named"),
    (["algorithm.loss=os.path"], "algorithm.loss=os.path: os.path has no function loss(inputs"),
]


@pytest.mark.parametrize(("overrides", "wanted"), BROKEN, ids=lambda value: str(value)[:40])
def test_a_broken_choice_is_refused_by_key(overrides, wanted):
    errors = check_config(compose_config(["experiment=smoke", *overrides]))
    assert any(wanted in error for error in errors), errors


def test_a_loss_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module with a Config and a function; its knobs are checked as ours are."""
    (tmp_path / "my_losses").mkdir()
    (tmp_path / "my_losses" / "scaled.py").write_text(
        "from dataclasses import dataclass\n"
        "from framework.algorithm.inputs import LossOutput\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Config:\n"
        "    factor: float = 1.0\n"
        "def loss(inputs, config):\n"
        "    return LossOutput(loss=-config.factor * inputs.policy_logprobs, metrics={})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def with_knob(name):
        line = ["algorithm.loss=my_losses.scaled", f"algorithm.loss_args.{name}=3.0"]
        return compose_config(["experiment=smoke", *line])

    config = with_knob("factor")
    assert check_config(config) == []
    ones = torch.ones(2)
    inputs = LossInputs(
        policy_logprobs=-ones,
        old_logprobs=-ones,
        rollout_logprobs=-ones,
        advantages=ones,
        loss_mask=ones,
        entropy=ones,
        sequences=Sequences(ids=torch.zeros(2, dtype=torch.int64), count=1, mask=ones),
    )
    assert build_objective(config)(inputs).loss.tolist() == [3.0, 3.0]
    assert "did you mean factor?" in check_config(with_knob("facto"))[0]
    assert build_objective(config).teacher_top_k == 0
    config.rollout.teacher_top_k = 5
    assert build_objective(config).teacher_top_k == 5
    (error,) = check_config(config)
    assert error.startswith("rollout.teacher_top_k=5: rollout.teacher is empty; name a model")
