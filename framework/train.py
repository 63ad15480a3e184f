"""Entry of a trainer rank: `torchrun ... -m framework.train --run-dir RUN`."""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from framework.checkpoints import (
    Checkpoint,
    find_checkpoint,
    newest_checkpoint,
    remove_unfinished,
)
from framework.compose import load_run_config
from framework.config import RunConfig
from framework.critic import build_credit, build_critic
from framework.launch.role_log import CONSEQUENCES, STARTS
from framework.lora import add_adapters, save_adapters
from framework.lora_checks import uses_lora
from framework.preference_checks import is_paired, needs_reference
from rollout.process import RESTARTS, follow_launcher
from rollout.run_dir import RunDir
from rollout.watchdog import dump_stacks_on_signal

if TYPE_CHECKING:
    from framework.megatron.model import Policy
    from framework.megatron.parallel import Mesh
    from megatron_bridge.export_plan import ExportPlan


def main() -> None:
    """Train as RUN/config.yaml says; exit 1 with one line on stderr when that fails."""
    parser = argparse.ArgumentParser(description="one trainer rank; start it with torchrun")
    parser.add_argument("--run-dir", type=Path, required=True)
    arguments = parser.parse_args()
    follow_launcher(direct=False)
    dump_stacks_on_signal()
    run_dir = RunDir(arguments.run_dir)
    first = os.environ.get("RANK", "0") == "0"
    if first and (start := int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))):
        print(f"{STARTS}{start + 1} of the trainers by torchrun", flush=True)
    try:
        with run_dir.hold("trainer") if first else contextlib.nullcontext():
            run(load_run_config(run_dir.path), run_dir)
    except Exception as error:  # the boundary of the process: every failure leaves one clear line
        traceback.print_exc()
        print(f"trainer: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if not may_pass(error) and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
            os.kill(os.getppid(), signal.SIGTERM)  # torchrun would only try it again
        sys.exit(1)


def may_pass(error: Exception) -> bool:
    """Whether trainers that start again may get further: a rank, a device or a link failed.

    What we raise ourselves has a reason that would recur.
    """
    upstream = type(error).__module__.partition(".")[0] in ("builtins", "torch")
    broken_off = any(word in str(error) for word in CONSEQUENCES)
    return isinstance(error, RuntimeError) and (upstream or broken_off)


def run(config: RunConfig, run_dir: RunDir) -> None:
    """Build this rank's trainer, run the loop, save the final policy to run_dir/hf."""
    from framework.megatron.checkpoint import CheckpointWriter
    from framework.megatron.model import DTYPES
    from framework.megatron.parallel import start_mesh, stop_mesh
    from framework.metrics import MetricsLogger
    from framework.weight_sync.connect import connect_engines, open_weight_sync
    from megatron_bridge.export_plan import ExportPlan
    from megatron_bridge.load import detect_spec

    if config.model.dtype == "float32":  # before CUDA starts: Transformer Engine would use TF32
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    mesh = start_mesh(config.parallel, config.seed)
    found = resume_point(config, run_dir, mesh.rank)
    done = found.step if found is not None else 0
    live = config.stage == "rl" and config.mode == "train"
    engines = connect_engines(config, run_dir, mesh.rank) if live else None
    dist.barrier()  # engines on our devices have given their memory away
    critic = build_critic(config, mesh, found)
    critic_model = None if critic is None else critic.model
    policy, reference = build_models(config, mesh, found)
    plan = ExportPlan(  # for engines
        hf_config=policy.hf_config,
        layout=mesh.layout,
        spec=detect_spec(policy.chunks),
        vocab_pad_multiple=config.model.vocab_pad_multiple,
        bucket_bytes=config.weight_sync.bucket_mb << 20,
        dtype=DTYPES[config.model.dtype],
        mtp=False,
    )
    source = batch_source(config, run_dir)
    logger = None
    if mesh.rank == 0:
        logger = MetricsLogger(run_dir.path, tensorboard=config.tracker.tensorboard, done=done)
        source.restore(done, found.rollout_state() if found is not None else b"")
    dist.barrier()  # no rank asks for batches before they are the right ones
    sync = None
    if live:
        sync = open_weight_sync(config, run_dir, mesh.rank, policy, plan, engines, critic_model)
    trainer = trainer_class(config)(
        config=config,
        mesh=mesh,
        policy=policy,
        source=source,
        sync=sync,
        logger=logger,
        reference=reference,
        critic=critic,
        credit=build_credit(config, mesh, found),
        checkpoints=(
            CheckpointWriter(config, policy, mesh, run_dir.checkpoints, critic_model)
            if config.checkpoint.every_steps
            else None
        ),
        start_step=done,
    )
    trainer.train()
    if sync is not None:
        sync.trainers_turn()
    save_policy(config, run_dir, mesh, policy, plan)
    if sync is not None:
        if config.rollout.engine.colocated and config.rollout.engine.urls:
            trainer.push(config.num_steps)  # somebody else's engines, and they sleep
        sync.close()
    if logger is not None:
        source.finish()
        logger.close()
    stop_mesh()


def save_policy(
    config: RunConfig, run_dir: RunDir, mesh: "Mesh", policy: "Policy", plan: "ExportPlan"
) -> None:
    """The final weights to RUN/hf, with adapters also to RUN/adapter; all ranks call it."""
    from megatron_bridge.mtp_export import mtp_source
    from megatron_bridge.save import save_hf

    policy.sync_parameters()
    if mesh.rank == 0 and run_dir.hf.exists():  # of the run that this one went on from
        shutil.rmtree(run_dir.hf)
    save_hf(
        replace(plan, mtp=True),  # an engine's has no such layers, the directory has
        policy.chunks,
        mesh.rank,
        run_dir.hf,
        like=config.model.hf_path,
        mtp_from=mtp_source(config.model.init_from, config.model.hf_path),
    )
    if uses_lora(config):
        if mesh.rank == 0 and run_dir.adapter.exists():
            shutil.rmtree(run_dir.adapter)
        save_adapters(policy, config, mesh, run_dir.adapter)


def build_models(config: RunConfig, mesh: Any, found: Checkpoint | None) -> tuple[Any, Any]:
    """The policy, from the checkpoint if there is one; the reference where the loss wants one."""
    from framework.megatron.checkpoint import load_checkpoint, load_weights
    from framework.megatron.lora import BaseReference
    from framework.megatron.model import build_policy, read_hf_config
    from framework.megatron.reference import Reference, ReferencePolicy
    from framework.megatron.sharded_state import blank_weights
    from megatron_bridge.load import load_hf, load_hf_body
    from megatron_bridge.models.mtp import without_mtp
    from megatron_bridge.models.score_head import has_score_head, score_config
    from megatron_bridge.torch_dist import is_torch_dist

    model, algorithm = config.model, config.algorithm
    hf_config = read_hf_config(model.hf_path)
    if not model.mtp:
        hf_config = without_mtp(hf_config)
    if config.stage == "reward_model":
        hf_config = score_config(hf_config)
    first = model.init_from or model.hf_path
    references: list[ReferencePolicy] = []

    def fill(chunks: list[Any]) -> None:
        """Give the bare models their weights, before the optimizer copies them."""

        def load(path: str) -> None:
            if is_torch_dist(path):
                load_weights(path, chunks, hf_config)
                return
            load_from = load_hf_body if has_score_head(hf_config) else load_hf
            load_from(chunks, path, mesh.layout, mesh.coords, model.vocab_pad_multiple, hf_config)

        if uses_lora(config):
            load(first)
            add_adapters(chunks, config, hf_config, mesh)
            if needs_reference(config):
                references.append(BaseReference(chunks))
            return  # a checkpoint holds the adapters alone
        if needs_reference(config):
            load(algorithm.reference or first)
            references.append(Reference(chunks, on_host=algorithm.reference_on == "host"))
        if found is not None:
            blank_weights(chunks)
        elif not references or algorithm.reference:
            load(first)

    policy = build_policy(
        hf_config,
        model,
        config.parallel,
        config.optimizer,
        mesh,
        fill,
        config.memory,
    )
    if found is not None:
        load_checkpoint(found, policy, mesh)
        every = algorithm.reference_refresh_steps
        if references and every and found.step >= every:
            if found.step % every:
                raise ValueError(
                    f"{found.path}: step {found.step} lies between two refreshes of the reference, "
                    f"whose weights no checkpoint holds; algorithm.reference_refresh_steps={every}"
                )
            references[0].refresh()  # it was, at this very step
    return policy, references[0] if references else None


def trainer_class(config: RunConfig) -> Any:
    """What runs the loop of this stage."""
    from framework.preference_trainer import PreferenceTrainer
    from framework.reward_trainer import RewardTrainer
    from framework.trainer import Trainer

    stages = {"preference": PreferenceTrainer, "reward_model": RewardTrainer}
    return stages.get(config.stage, Trainer)


def resume_point(config: RunConfig, run_dir: RunDir, rank: int) -> Checkpoint | None:
    """Where this run goes on; the same on every rank. None: at its beginning.

    A run that has checkpoints of its own goes on from the newest when it may (checkpoint.resume)
    or when torchrun has started its trainers again.

    Raises:
        ValueError: the checkpoint is damaged or of another kind of run.
    """
    box: list[Any] = [None, ""]
    if rank == 0:
        try:
            box[0] = _find_resume_point(config, run_dir)
        except ValueError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if box[1]:
        raise ValueError(box[1])
    return box[0]


def _find_resume_point(config: RunConfig, run_dir: RunDir) -> Checkpoint | None:
    resume = config.checkpoint.resume
    starts = (os.environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", RESTARTS))
    restarted = any(int(count) > 0 for count in starts)
    remove_unfinished(run_dir.checkpoints)
    if resume == "never" and not restarted:
        return None
    found = newest_checkpoint(run_dir.checkpoints)
    if found is None and resume not in ("auto", "never"):
        found = find_checkpoint(resume)
    if found is not None and found.manifest.stage != config.stage:
        raise ValueError(
            f"checkpoint.resume={resume}: {found.path} is of stage={found.manifest.stage}, this "
            f"run of stage={config.stage}; start from its hf/ with model.init_from"
        )
    return found


def batch_source(config: RunConfig, run_dir: RunDir):
    """Where this run's batches come from."""
    from rollout.source import BufferClient, JournalSource

    if config.stage != "rl":
        from transformers import AutoTokenizer

        from framework.demonstrations import demonstration_source, preference_source

        tokenizer = AutoTokenizer.from_pretrained(config.model.hf_path)
        if config.stage == "sft":
            return demonstration_source(config, tokenizer)
        return preference_source(config, tokenizer, paired=is_paired(config))
    if config.mode == "train_only":
        return JournalSource(Path(config.replay_dir))
    timeout_s = config.rollout.batch_timeout_s
    if config.rollout.address:
        return BufferClient(config.rollout.address, run_dir.token(), timeout_s)
    return BufferClient(
        run_dir.wait_address("rollout", timeout_s),
        run_dir.token(),
        timeout_s,
        reconnect_s=config.rollout.reconnect_timeout_s,
        find_url=lambda: run_dir.read_address("rollout"),
    )


if __name__ == "__main__":
    main()
