"""`drivetrain-rollout --run-dir RUN`: the process between the engines and the trainers.

mode=train: serves batches and evaluations over HTTP until /finish or SIGTERM.
mode=rollout_only: journals num_steps batches of version 0 and ends. mode=eval: evaluates once.
"""

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass

import uvicorn

from rollout.bodies import listen
from rollout.client import EngineClient, EngineFailure
from rollout.config import EngineConfig, RolloutRun, load_rollout_run
from rollout.domain import TaskPrompts, open_tasks
from rollout.ending import BoundedRunner
from rollout.evaluate import Evaluator
from rollout.mixed_buffer import MixedBuffer
from rollout.process import follow_launcher
from rollout.producer import Producer, ProducerFailure
from rollout.run_dir import RunDir
from rollout.service import Service
from rollout.side_models import SideModels
from rollout.teacher import open_teacher
from rollout.tokens import Chat
from rollout.watchdog import dump_stacks_on_signal

_STOP_S = 8.0
"""How long a server that was told to end may take; longer than its own graceful shutdown."""
_LAST_WORDS_S = 2.0
"""How long a failed process goes on answering, so that waiting trainers learn the reason."""


@dataclass(kw_only=True, slots=True)
class Parts:
    """What a rollout process is made of."""

    run: RolloutRun
    run_dir: RunDir
    producer: Producer
    evaluator: Evaluator


@contextlib.asynccontextmanager
async def assemble(run_dir: RunDir) -> AsyncIterator[Parts]:
    """Wait for the engines, then put the parts together; stops generation at the end."""
    run = load_rollout_run(run_dir.config)
    side_models = SideModels(run.rollout.side_models, run_dir)
    engine = run.rollout.engine
    prompts = TaskPrompts.of(run)  # refuse bad data.args before anything is waited for
    chat = Chat.load(run.model.hf_path)
    roles = _generation_roles(engine)
    urls = await _generation_urls(run_dir, engine, roles)
    await side_models.wait(engine.start_timeout_s)

    def find_urls() -> list[str]:
        return [url for role in roles if (url := run_dir.read_address(role)) is not None]

    async with (
        EngineClient(
            urls, engine.api_key or run_dir.token(), engine, find_urls if roles else None
        ) as client,
        open_teacher(run.rollout, side_models, chat) as teacher,
        open_tasks(
            prompts,
            run,
            token=run_dir.token(),
            client=client,
            chat=chat,
            find=side_models.find,
            teacher=teacher,
        ) as (domains, sets),
    ):
        standalone = run.mode == "rollout_only"
        producer = Producer(
            buffer=MixedBuffer(
                groups_per_step=run.rollout.prompts_per_step,
                # One version makes every batch there: no bound to keep.
                max_staleness_steps=(
                    run.num_steps if standalone else run.rollout.max_staleness_steps
                ),
                num_steps=run.num_steps,
                weights={each.name: each.weight for each, _ in prompts.domains},
                curriculum=run.data.curriculum,
                oversample=run.rollout.oversample,
            ),
            domains=domains,
            rollouts=run_dir.rollouts,
            max_dropped_per_step=run.rollout.max_refills
            * run.rollout.prompts_per_step
            * (1 + run.rollout.max_staleness_steps),  # groups run ahead by so many steps
            keep_share=run.rollout.keep_share,
        )
        evaluator = Evaluator(sets=sets, chat=chat, results=run_dir.eval)
        try:
            yield Parts(run=run, run_dir=run_dir, producer=producer, evaluator=evaluator)
        finally:
            await producer.close()


def _generation_roles(engine: EngineConfig) -> list[str]:
    """Who of this run answers generation calls: its router, or every engine."""
    if engine.router:
        return ["router"]
    return [] if engine.urls else [f"engine_{k}" for k in range(engine.num_engines)]


async def _generation_urls(run_dir: RunDir, engine: EngineConfig, roles: list[str]) -> list[str]:
    """Where generation calls go: somebody else's engines, or this run's roles."""
    # Not in a thread: one that waits would be waited for when we are told to end.
    return [
        await run_dir.wait_address_async(role, engine.start_timeout_s) for role in roles
    ] or engine.urls


async def serve(parts: Parts, stop: asyncio.Event) -> None:
    """Serve the trainers until /finish, `stop`, or a failure (ProducerFailure)."""
    config = parts.run.rollout
    service = Service(
        producer=parts.producer,
        evaluator=parts.evaluator,
        token=parts.run_dir.token(),
        max_body_bytes=config.max_body_bytes,
    )
    server = uvicorn.Server(
        uvicorn.Config(
            service.app(), log_level="warning", access_log=False, timeout_graceful_shutdown=5
        )
    )
    server.install_signal_handlers = lambda: None  # pyright: ignore  # ours are in run()
    listener = listen(config.host, config.port)
    with listener:
        host = socket.gethostname() if config.host == "0.0.0.0" else config.host  # noqa: S104
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        parts.run_dir.write_address("rollout", f"http://{host}:{listener.getsockname()[1]}")
        try:
            await _first_of(service.finished, stop, parts.producer.failed, serving)
            if parts.producer.failed.is_set():
                await asyncio.sleep(_LAST_WORDS_S)
            elif serving.done():
                raise ProducerFailure("the HTTP server ended by itself; see the log above")
        finally:
            parts.run_dir.remove_address("rollout")
            server.should_exit = True
            await serving
    if parts.producer.failure is not None:
        raise ProducerFailure(parts.producer.failure)


async def _first_of(*ends: "asyncio.Event | asyncio.Task") -> None:
    tasks = [
        end if isinstance(end, asyncio.Task) else asyncio.create_task(end.wait()) for end in ends
    ]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task, end in zip(tasks, ends, strict=True):
        if task is not end:
            task.cancel()


async def collect(parts: Parts) -> None:
    """mode=rollout_only: journal num_steps batches of version 0."""
    parts.producer.publish(0)
    for step in range(parts.producer.buffer.next_step, parts.run.num_steps):
        delivered = await parts.producer.batch(step, parts.run.rollout.batch_timeout_s)
        if delivered is None:
            raise ProducerFailure(
                f"no batch for step {step} within rollout.batch_timeout_s="
                f"{parts.run.rollout.batch_timeout_s:g}; groups "
                f"{parts.producer.buffer.blockers()[:8]} are still running"
            )
        figures = delivered[0].metrics
        print(
            f"step {step}: reward {figures['rollout/reward_mean']:.3f}, "
            f"{figures['rollout/tokens_per_s']:.0f} tokens/s",
            flush=True,
        )


async def run(run_dir: RunDir) -> None:
    """What the run's mode asks for; ends early on SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    serving = asyncio.Event()
    work = asyncio.create_task(_work(run_dir, stop, serving))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not work.done():
        # A server ends by itself when told to; anything else is cancelled.
        done, _ = await asyncio.wait({work}, timeout=_STOP_S if serving.is_set() else 0)
        if not done:
            work.cancel()
    try:
        await work
    except asyncio.CancelledError:
        raise ProducerFailure("told to end before it was finished") from None


async def _work(run_dir: RunDir, stop: asyncio.Event, serving: asyncio.Event) -> None:
    async with assemble(run_dir) as parts:
        parts.producer.recover()
        match parts.run.mode:
            case "train":
                serving.set()
                await serve(parts, stop)
            case "rollout_only":
                await collect(parts)
            case "eval":
                result = await parts.evaluator.run(0)
                print(f"accuracy {result.accuracy:.3f} on {result.num_prompts} prompts", flush=True)
            case mode:
                raise ValueError(f"mode={mode!r}: the rollout process has no part in it")


def main() -> None:
    """`drivetrain-rollout`: exit 0 when done, 1 when generation failed, 2 when refused."""
    parser = argparse.ArgumentParser(prog="drivetrain-rollout", description=__doc__)
    parser.add_argument("--run-dir", required=True)
    arguments = parser.parse_args()
    follow_launcher()
    dump_stacks_on_signal()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    with BoundedRunner() as runner:
        _main(RunDir(arguments.run_dir), runner)


def _main(run_dir: RunDir, runner: asyncio.Runner) -> None:
    try:
        with run_dir.hold("rollout"):
            runner.run(run(run_dir))
    except (ProducerFailure, EngineFailure, TimeoutError, OSError) as error:
        sys.exit(f"drivetrain-rollout: {error}")
    except ValueError as error:
        print(f"drivetrain-rollout: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
