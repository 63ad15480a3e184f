"""Fields of a run that say where it computes and what it keeps, not what it trains."""

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Resumable state in run_dir/checkpoints: trainers, journal position and the data buffer."""

    every_steps: int = 0
    """Save after every so many steps and after the last one; 0: never."""
    keep: int = 2
    """Newest checkpoints that stay; 0: all of them."""
    keep_every_steps: int = 0
    """Besides those, checkpoints of steps divisible by this stay for good; 0: none."""
    async_save: bool = True
    """Write in the background while the next steps train."""
    resume: str = "never"
    """never | auto: go on with run_dir's run from its newest checkpoint | a checkpoint's path."""
    timeout_s: float = 600.0
    """Longest wait for a background save."""


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Where the roles run."""

    launcher: str = "local"
    """local: this machine | slurm: one sbatch job | manual: write the run directory, tell how."""
    num_nodes: int = 1
    gpus_per_node: int = 8
    gpu: str = "H100"
    """Kind of GPU that dry_run plans for, a row of framework.gpus.GPUS."""
    cpus_per_task: int = 8
    trainer_nodes: int = 1
    engine_nodes: int = 0
    """Nodes of the engines; 0: they share the trainers' nodes."""
    partition: str = ""
    account: str = ""
    time: str = "04:00:00"
    container_image: str = ""
    extra_sbatch: list[str] = field(default_factory=list)
    """Further #SBATCH lines, verbatim."""
    setup: str = ""
    """Shell lines that every node runs before a role starts (source .venv/bin/activate)."""
    stop_timeout_s: float = 20.0
    """How long roles may take to end when asked, before they are killed."""
    max_restarts: int = 3
    """How often a role that dies (engine, router, rollout process, trainers) is started again
    within restart_window_s before the run ends; 0: never."""
    restart_window_s: float = 3600.0
    watchdog_s: float = 120.0
    """A wait of the trainers that takes longer is told in their log, with what is missing and the
    stacks of the process; 0: never."""


@dataclass(kw_only=True, slots=True)
class TrackerConfig:
    """Where figures go besides metrics.jsonl."""

    tensorboard: bool = True
    progress: bool = True
    """Live display on a terminal; plain lines elsewhere."""
    report: bool = True
    """report.html at the end."""


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    """A trace of chosen steps in run_dir/profile, for chrome://tracing, Perfetto or TensorBoard."""

    first_step: int = 0
    """First step that is traced; 0: none."""
    num_steps: int = 1
    ranks: list[int] = field(default_factory=lambda: [0])
    """Trainer ranks that write a trace each."""
    memory_snapshot: bool = False
    """Also record every allocation on the GPU, for pytorch.org/memory_viz."""
