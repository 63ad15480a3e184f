"""The rollout side's configuration: what to ask, how to sample, which engines answer.

`framework.config` places these dataclasses in the run's configuration as `rollout` and `data`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """How the policy is sampled. Truncated sampling (top_p, top_k) is refused for training."""

    temperature: float = 1.0
    """Softmax temperature; the trainer computes its log-probs at the same one."""
    top_p: float = 1.0
    top_k: int = -1
    max_new_tokens: int = 16
    """Longest response in tokens."""
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """The SGLang servers."""

    num_engines: int = 1
    tp: int = 1
    """Tensor-parallel ranks of one engine."""
    device: str = "auto"
    """auto | cpu | cuda"""
    dtype: str = "float32"
    """float32 | bfloat16: what the engine computes in."""
    deterministic: bool = True
    """Seeded, batch-invariant sampling: the same run twice gives the same tokens."""
    max_total_tokens: int = 65536
    """KV-cache capacity in tokens."""
    max_running_requests: int = 256
    host: str = "127.0.0.1"
    """Interface the servers bind to; 0.0.0.0: all, and the others use the host's name."""
    urls: list[str] = field(default_factory=list)
    """Engines that somebody else runs; none is started when this is set."""
    api_key: str = ""
    """What requests to the engines carry; empty: the run's own token."""
    return_routes: bool = False
    """Samples of a mixture of experts carry which experts the engine chose for each token, for
    algorithm.routing_replay=rollout; see rollout.routes."""
    colocated: bool = False
    """Engines and trainers take turns on the same devices; needs max_staleness_steps=0."""
    router: bool = False
    """Put sglang-router before the engines; off: the rollout process deals its calls out itself."""
    router_policy: str = "power_of_two"
    """power_of_two | round_robin | random | cache_aware: how the router chooses an engine."""
    start_timeout_s: float = 300.0
    request_timeout_s: float = 600.0
    max_retries: int = 3
    args: dict[str, Any] = field(default_factory=dict)
    """Any SGLang server argument by its own field name, checked against the installed version."""


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """From prompts to batches."""

    prompts_per_step: int = 16
    """Groups in one training step."""
    samples_per_prompt: int = 16
    """Samples in a group."""
    max_staleness_steps: int = 0
    """0: on-policy; 1: one step off; n: no group trained on is older than n versions."""
    filters: list[str] = field(default_factory=list)
    """Rows of rollout.filters.FILTERS (dynamic_sampling | failed), or functions of yours:
    package.module.function. A group that one of them drops is replaced by another prompt's."""
    max_refills: int = 20
    """The run ends when filters drop more than this times prompts_per_step groups for one step."""
    oversample: float = 0.0
    """This share more groups are started than a step trains: once as many have finished as it
    trains, these are trained (of more, the first begun) and the others aborted. Needs
    max_staleness_steps=0 and engine.deterministic=false."""
    greedy_baseline: bool = False
    """ReMax: one more answer to every prompt, at temperature 0, which is not trained on; its reward
    is the baseline of the others."""
    keep_share: float = 1.0
    """StarPO-S: of a step's groups only this share, those whose rewards spread most, is trained."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    side_models: dict[str, Any] = field(default_factory=dict)
    """Frozen models beside the policy, by name: each {kind, model_path, tp, dtype, args, ...}, an
    SGLang server of this run, or {kind, url}; see rollout.side_models."""
    teacher: str = ""
    """A side model of kind generate whose log-prob of every sampled token is carried with the
    samples, for algorithm=on_policy_distillation."""
    teacher_top_k: int = 0
    """How many of the teacher's likeliest tokens, with their log-probs, are carried for every token
    of a response too, for algorithm=gkd or a loss of your own: 8 bytes each; 0: none."""
    host: str = "127.0.0.1"
    """Interface the rollout process binds to."""
    port: int = 0
    """0: any free port; the address is written to the run directory."""
    agent_port: int = 0
    """Of the endpoint of data.generate=agent, on the same interface; 0: any free one."""
    address: str = ""
    """http://host:port of a rollout process started elsewhere; empty: in the run directory."""
    batch_timeout_s: float = 600.0
    """Longest wait of the trainers for one batch before the run fails and says what was missing."""
    reconnect_timeout_s: float = 300.0
    """How long the trainers try to reach a rollout process that died, until another has taken its
    place."""
    max_body_bytes: int = 268435456
    """Largest HTTP request the rollout process accepts."""


@dataclass(kw_only=True, slots=True)
class AgentConfig:
    """A black-box agent (data.generate=agent): one of command and function."""

    command: list[str] = field(default_factory=list)
    """A process an episode, as words: [python, my_agent.py]. The task is JSON on its stdin; its
    environment has OPENAI_BASE_URL and OPENAI_API_KEY; it ends with status 0."""
    function: str = ""
    """package.module.function of an AgentCall, a coroutine or not."""
    override_sampling: bool = False
    """An agent that asks for another temperature than the run's gets the run's; off: refused."""


@dataclass(kw_only=True, slots=True)
class CurriculumConfig:
    """Weights of data.mixture that follow the domains' pass rates, see rollout.shares."""

    enabled: bool = False
    """A domain of pass rate p has its weight times floor + (1 - floor) * 4 p (1 - p)."""
    floor: float = 0.1
    """What is left of a domain's weight when all or none of its samples are right."""
    memory_steps: float = 10.0
    """Pass rates are moving averages over about so many steps."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """The task: where prompts come from and what scores the answers."""

    task: str = "sort"
    """A row of rollout.environments.ENVIRONMENTS, or a class of yours: package.module.Class."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of that environment's constructor, of the types it declares; rollout/README.md has
    those of the bundled ones."""
    path: str = ""
    """Stage sft: a JSONL file of conversations; stages preference and reward_model: one of pairs
    (or of labelled answers); empty: demonstrations and pairs are the task's."""
    eval_path: str = ""
    """A file like it to evaluate on; empty: an eighth of data.path, chosen by a hash of the prompt,
    is never trained on."""
    reward: str = "environment"
    """A row of rollout.rewards.REWARDS (`environment`: what the environment itself says), or a
    function of yours, package.module.function: of (sample, task), or of a group's (samples,
    tasks)."""
    generate: str = "environment"
    """Who plays the episodes: `environment` (its turns), `agent` (data.agent, over HTTP), or a
    program of yours, package.module.function: async (engine, task, sampling) -> list[Sample]."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    episode_timeout_s: float = 300.0
    """Bound of a whole episode that data.generate plays; past it the episode counts as failed."""
    max_concurrency: int = 0
    """Calls of environments and rewards, and episodes of data.generate, that run at a time. 0: any
    number; of data.agent.command twice the CPU cores."""
    rewards: dict[str, Any] = field(default_factory=dict)
    """Instead of `reward`: several by name, weighted and added, each {kind, weight, timeout_s,
    max_retries, args}; see rollout.rewards.weighted. Kinds beyond `reward`'s: http | judge |
    reward_model."""
    eval_reward: str = ""
    """What evaluations count instead of the training reward, a row or function as `reward` takes:
    `environment` where a model of what is right is trained against."""
    overlong_share: float = 0.0
    """DAPO's soft punishment: from where this share of rollout.sampling.max_new_tokens is left, the
    training reward falls, by overlong_penalty where none is left. 0: none."""
    overlong_penalty: float = 1.0
    timeout_s: float = 60.0
    """Bound of one environment step and of one reward; past it the sample counts as failed. Waiting
    for a free process (data.reward=math, code) does not count."""
    eval_num_prompts: int = 500
    """Held-out prompts of one evaluation, drawn from a stream that training never sees."""
    eval_temperature: float = 1.0
    mixture: dict[str, Any] = field(default_factory=dict)
    """Several tasks in one run, by name, each {weight, task, args, reward, ..., sampling, filters,
    max_running_groups}: every step has groups of each in the ratio of the weights. What one leaves
    out is as in `data` and `rollout`; see rollout.mixture."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)


@dataclass(kw_only=True, slots=True)
class RolloutModel:
    """What the rollout side needs of the run's `model` section."""

    hf_path: str
    init_from: str = ""


@dataclass(kw_only=True, slots=True)
class RolloutBatch:
    """What the rollout side needs of the run's `batch` section."""

    max_tokens_per_microbatch: int
    overlong: str


@dataclass(kw_only=True, slots=True)
class RolloutParallel:
    """What the rollout side needs of the run's `parallel` section."""

    cp: int


@dataclass(kw_only=True, slots=True)
class RolloutEval:
    """What the rollout side needs of the run's `eval` section."""

    sets: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True)
class RolloutRun:
    """What the rollout side reads of a run's config.yaml."""

    mode: str
    seed: int
    num_steps: int
    model: RolloutModel
    rollout: RolloutConfig
    data: DataConfig
    batch: RolloutBatch
    parallel: RolloutParallel
    eval: RolloutEval = field(default_factory=RolloutEval)


def load_rollout_run(config_path: Path) -> RolloutRun:
    """Read a run directory's config.yaml; sections of the trainers are left alone."""
    try:
        whole = OmegaConf.load(config_path)
    except FileNotFoundError:
        raise ValueError(f"{config_path}: missing; is this a run directory?") from None
    schema = OmegaConf.structured(RolloutRun)
    if not isinstance(whole, DictConfig):
        raise ValueError(f"{config_path}: holds no mapping")
    ours = {name: whole[name] for name in RolloutRun.__dataclass_fields__ if name in whole}
    for section, part in (
        ("model", RolloutModel),
        ("batch", RolloutBatch),
        ("parallel", RolloutParallel),
        ("eval", RolloutEval),
    ):
        if section in ours:
            known = part.__dataclass_fields__
            ours[section] = {name: ours[section][name] for name in known if name in ours[section]}
    try:
        return OmegaConf.to_object(OmegaConf.merge(schema, ours))  # pyright: ignore
    except (OmegaConfBaseException, KeyError) as error:
        key = getattr(error, "full_key", None) or "model"
        reason = str(error).splitlines()[0]
        raise ValueError(f"{config_path}: {key}: {reason}") from error
