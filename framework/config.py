"""Every field of a run, with its type, default and meaning. YAML holds choices only.

`framework.compose` builds a RunConfig from Hydra groups and command-line overrides;
`framework.checks` refuses what cannot work, before anything starts.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from framework.config_critic import CriticConfig
from framework.config_lora import LoraConfig
from framework.config_stages import PreferenceConfig, WarmStartConfig
from framework.config_system import CheckpointConfig, ClusterConfig, ProfileConfig, TrackerConfig
from megatron_bridge.layout import Layout
from rollout.config import DataConfig, RolloutConfig


@dataclass(kw_only=True, slots=True)
class TinyModelConfig:
    """A randomly initialised Qwen3 with a character tokenizer, for machines without a model hub."""

    num_layers: int = 2
    hidden_size: int = 64
    num_heads: int = 4
    num_kv_heads: int = 2
    ffn_size: int = 192
    tied: bool = True
    num_experts: int = 0
    """Experts of every layer, each of ffn_size (a Qwen3-MoE); 0: a dense model."""
    experts_per_token: int = 2
    init_seed: int = 0


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The policy."""

    hf_path: str = ""
    """Hugging Face directory: config.json, safetensors, tokenizer. Empty: `tiny` is created."""
    init_from: str = ""
    """Whose weights replace those of hf_path: a Hugging Face directory (an earlier stage's hf/) or,
    for trainers, a Megatron checkpoint (RUN/checkpoints/step_000010, drivetrain-convert's)."""
    tiny: TinyModelConfig = field(default_factory=TinyModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    dtype: str = "float32"
    """float32 | bfloat16: parameters and activations of the trainer (gradients stay fp32)."""
    fp8: str = "none"
    """none | hybrid (e4m3 forward, e5m2 backward) | e4m3: the trainer's matrix products, by
    Transformer Engine; needs dtype=bfloat16."""
    fp8_recipe: str = "blockwise"
    """How values are scaled into fp8: tensorwise | delayed | blockwise (Hopper) | mxfp8
    (Blackwell)."""
    vocab_pad_multiple: int = 8
    """The vocabulary is padded to a multiple of this times tp."""
    mtp: bool = False
    """Train the multi-token prediction layers that hf_path has, beside the policy and without a
    gradient into it (the weight of their loss: megatron.mtp_loss_scaling_factor, 0.1). false: they
    are not built; every export carries those of init_from or else hf_path on as they are."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Any field of megatron-core's TransformerConfig, checked against the installed version."""


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """The trainers' layout: world size = tp * pp * cp * dp."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    """Model chunks per pipeline stage (1: no interleaving)."""
    cp: int = 1
    ep: int = 1
    """Ranks that share the experts of a layer; taken out of tp * cp * dp."""
    etp: int = 1
    """Ranks that each expert is cut over."""
    dp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    """Each data-parallel rank keeps and updates a part of the optimizer's state."""
    fsdp: bool = False
    """Megatron-FSDP: parameters and gradients are cut over the data-parallel ranks as well, and
    gathered layer by layer; with distributed_optimizer."""
    overlap: bool = False
    """Reduce gradients during the backward pass and, with distributed_optimizer, gather parameters
    during the forward pass."""
    first_stage_layers: int = 0
    """Layers of the first pipeline stage; 0: an even share."""
    last_stage_layers: int = 0
    """Layers of the last pipeline stage; 0: an even share."""
    timeout_s: float = 600.0
    """Bound of every collective among the trainers."""

    @property
    def world_size(self) -> int:
        """Number of trainer processes."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def layout(self) -> Layout:
        """The same as ranks and coordinates; ValueError where the sizes do not fit each other."""
        return Layout(**{each.name: getattr(self, each.name) for each in fields(Layout)})


@dataclass(kw_only=True, slots=True)
class MemoryConfig:
    """What is computed twice so that less is kept; results stay the same."""

    recompute: str = "none"
    """none | selective: the activations of recompute_modules in every layer are not kept but
    computed again in the backward pass | full: of whole layers only the input is kept."""
    recompute_modules: list[str] = field(default_factory=lambda: ["core_attn"])
    """With selective: any of megatron-core's recompute_modules (core_attn, mlp, moe,
    shared_experts, and with Transformer Engine layernorm, moe_act, mla_up_proj)."""
    recompute_method: str = "uniform"
    """With full: uniform (all layers, in units of recompute_layers) | block (only the first
    recompute_layers layers of a pipeline stage)."""
    recompute_layers: int = 1
    """With full: layers of a unit (uniform), or of a stage (block), that are recomputed."""
    logits_chunk_tokens: int = 4096
    """Logits of more positions than these are never there at once: they are computed in chunks, and
    again in the backward pass."""


@dataclass(kw_only=True, slots=True)
class AlgorithmConfig:
    """What turns rewards into a gradient. One yaml per published method."""

    name: str = "grpo"
    advantage: str = "group_normalized"
    """A row of framework.algorithm.advantages.ADVANTAGES, or a module of yours: package.module; or
    of framework.algorithm.critic.VALUE_ADVANTAGES: the run then has a critic; or of
    framework.algorithm.returns.RETURN_ADVANTAGES: of rewards of tokens; or of
    framework.algorithm.tokens.TOKEN_ADVANTAGES: of a teacher's log-probs."""
    advantage_args: dict[str, Any] = field(default_factory=dict)
    """Its knobs: the fields of its Config."""
    loss: str = "ppo_clip"
    """A row of framework.algorithm.losses.LOSSES (for stage=preference of PREFERENCE_LOSSES), or a
    module of yours: package.module."""
    loss_args: dict[str, Any] = field(default_factory=dict)
    """Its knobs: the fields of its Config."""
    correction: str = "none"
    """Of trainer against engine policy: a row of framework.algorithm.corrections.CORRECTIONS."""
    correction_args: dict[str, Any] = field(default_factory=dict)
    """Its knobs: the fields of its Config."""
    kl_coef: float = 0.0
    """This times the divergence from the reference policy is added to each token's loss; 0: no
    reference is held."""
    kl_estimator: str = "k3"
    """k2 | k3 | straight_through | unbiased, see framework.algorithm.kl."""
    kl_reward_coef: float = 0.0
    """The KL penalty in the reward, instead of kl_coef: this times k1, log pi_old - log pi_ref of a
    token, is taken from what it earned. For advantages from rewards of tokens: gae,
    discounted_return. 0: off."""
    kl_reward_target: float = 0.0
    """Nats of an answer at which kl_reward_coef, which then adapts, holds the divergence; see
    framework.algorithm.kl_control. 0: it stays."""
    kl_reward_horizon: float = 10000.0
    """Samples in which an adapting kl_reward_coef changes by a fifth at most."""
    reference: str = ""
    """Hugging Face directory of the reference policy; empty: what the run begins with, that is
    model.init_from, else model.hf_path."""
    reference_refresh_steps: int = 0
    """Every so many steps the policy becomes the reference; 0: it stays what it was."""
    reference_on: str = "host"
    """host | device: where its weights wait between passes."""
    entropy_coef: float = 0.0
    """Entropy bonus: this times the policy's entropy is subtracted from each token's loss."""
    aggregation: str = "token_mean"
    """token_mean | sequence_mean | sequence_sum | sequence_sum_over_length: of the global batch."""
    updates_per_step: int = 1
    """Optimizer steps on one batch of rollouts."""
    old_logprobs: str = "trainer"
    """trainer | engine | log_linear: against which policy ratios are taken; the latter two save the
    trainer's own pass, see framework.algorithm.proximal."""
    routing_replay: str = "none"
    """none | old_policy | rollout: of a mixture of experts, whose choice of experts the update
    repeats: its own, that of the pass before a batch's updates, or the engine's; see
    framework.megatron.routing_replay."""
    recompute_old_logprobs: bool = False
    """Run the extra forward pass even where old_logprobs equal the policy's own (one update)."""


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then constant."""

    lr: float = 2e-4
    warmup_steps: int = 10
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0


@dataclass(kw_only=True, slots=True)
class BatchConfig:
    """How sequences are packed into micro-batches."""

    max_tokens_per_microbatch: int = 8192
    """Budget of one packed micro-batch of one data-parallel rank."""
    overlong: str = "refuse"
    """refuse | truncate: what becomes of a sample longer than the budget. truncate cuts the end of
    its response and counts it in train/truncated_samples and train/truncated_tokens. A prompt that
    leaves no room for a response fails its samples (rollout/failed_fraction) unsampled."""


@dataclass(kw_only=True, slots=True)
class WeightSyncConfig:
    """How the engines get new weights."""

    transport: str = "distributed"
    """A row of framework.weight_sync.TRANSPORTS: distributed | direct | disk | delta | tensor (one
    host)."""
    bucket_mb: int = 256
    verify: bool = True
    """After every push compare the engine's own checksum of every tensor with ours."""
    pause_mode: str = "retract"
    """SGLang's pause mode while weights change: retract (exact) | in_place."""
    timeout_s: float = 300.0
    full_every_pushes: int = 50
    """With transport=delta every so many pushes all weights travel, not only what changed; 0: only
    where an engine needs them."""
    quantization: str = "none"
    """none | fp8_rounded, mxfp4_rounded, int2_rounded: linear weights are rounded to block fp8 (128
    x 128), MXFP4 or two bits a weight, and back before they are sent | fp8: they are sent so, with
    their scales, to engines that serve fp8. In each case the engine samples from the rounded
    policy, the trainer trains the other one."""


@dataclass(kw_only=True, slots=True)
class GateConfig:
    """Checks that stop a run whose trainer and engine disagree."""

    enabled: bool = True
    logprob_abs_diff_max: float = 1e-4
    """Bound of |trainer - engine| log-prob on the first batch's sampled tokens (fp32)."""
    logprob_abs_diff_max_bf16: float = 0.5
    logprob_abs_diff_max_quantized: float = 0.0
    """The bound with weight_sync.quantization, which must be given there: how far rounded weights
    may be off is the model's own."""


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """When to measure accuracy on held-out prompts."""

    every_steps: int = 0
    """0: only before the first and after the last step."""
    at_start: bool = True
    at_end: bool = True
    sets: dict[str, Any] = field(default_factory=dict)
    """Further prompts to measure on, by name, each {task, args, reward, ..., sampling, num_prompts,
    samples_per_prompt}; see rollout.eval_sets."""
    target_accuracy: float = 0.0
    """What an experiment should end with: a finished run says when it did not. 0: nothing said."""
    target_gain: float = 0.0
    """How much accuracy should have risen since the first evaluation. 0: nothing said."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One run, whole."""

    name: str = "run"
    run_dir: str = ""
    """Empty: runs/<name>."""
    mode: str = "train"
    """train | rollout_only | train_only | eval"""
    stage: str = "rl"
    """rl | sft | preference | reward_model"""
    seed: int = 0
    num_steps: int = 200
    replay_dir: str = ""
    """For mode=train_only: the rollouts/ directory of an earlier run."""
    dry_run: bool = False
    """Show what would run: configuration, ranks, memory, traffic, script; start nothing."""
    dry_run_rank: int = -1
    """With dry_run also let megatron-core build this rank, without memory, and compare it with the
    weight table; -1: none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: DataConfig = field(default_factory=DataConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
