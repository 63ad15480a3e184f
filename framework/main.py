"""`drivetrain key=value ...`: one run, from the command line to the last line a person reads.

Exit status: 0 the run finished; 2 the configuration was refused, nothing was started and no run
directory made; 1 the run failed; 130 (SIGINT) or 128 + signal: it was ended. The reason is on
stderr in one line each.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from framework.checks import check_config
from framework.compose import ConfigError, compose_config
from framework.config import RunConfig
from framework.help_text import help_text
from framework.notes import config_notes

if TYPE_CHECKING:
    from framework.launch.prepare import Stages

EXIT_FAILED = 1
EXIT_REFUSED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `drivetrain`; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(help_text())
        return 0
    try:
        config = read_config(arguments)
    except ConfigError as error:
        for line in error.errors:
            print(f"drivetrain: {line}", file=sys.stderr)
        return EXIT_REFUSED
    for note in config_notes(config):
        print(f"drivetrain: note: {note}", file=sys.stderr)
    if config.dry_run:
        from framework.plan import describe_run

        try:
            print(describe_run(config))
        except ValueError as error:
            print(f"drivetrain: {error}", file=sys.stderr)
            return EXIT_REFUSED
        return 0
    try:
        return start_run(config)
    except KeyboardInterrupt:  # before the supervisor took the signals over
        print("drivetrain: ended by SIGINT", file=sys.stderr)
        return 130


def read_config(arguments: list[str]) -> RunConfig:
    """The checked configuration of a command line; ConfigError lists all that is wrong."""
    config_dir, overrides = "", []
    remaining = iter(arguments)
    for argument in remaining:
        if argument == "--config-dir":
            config_dir = next(remaining, "")
            if not config_dir:
                raise ConfigError(["--config-dir: a directory is wanted"])
        elif argument.startswith("--config-dir="):
            config_dir = argument.partition("=")[2]
        elif argument.startswith("-"):
            raise ConfigError([f"{argument}: no such option; settings are key=value, see --help"])
        else:
            overrides.append(argument)
    config = compose_config(overrides, config_dir)
    errors = check_config(config)
    if errors:
        raise ConfigError(errors)
    return config


def start_run(config: RunConfig) -> int:
    """Write the run directory and hand the run to its launcher; returns the exit status."""
    from framework.launch.lock import hold_run_dir

    try:
        with hold_run_dir(Path(config.run_dir)):
            return _start_run(config)
    except ConfigError as error:
        print(f"drivetrain: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except OSError as error:
        return _failed(f"run_dir={config.run_dir}: {error}")


def _start_run(config: RunConfig) -> int:
    from framework.launch.prepare import write_run

    started = time.monotonic()
    stages = write_run(config)
    if stages.resumed_from:
        print(f"drivetrain: goes on after step {stages.resumed_from}", flush=True)
    if config.cluster.launcher == "slurm":
        from framework.launch.slurm import SubmitError, submit

        try:
            print(f"drivetrain: {submit(stages)}")
        except (SubmitError, ValueError) as error:
            return _failed(str(error))
        return 0
    if config.cluster.launcher == "manual":
        from framework.launch.manual import describe_commands

        print(describe_commands(stages))
        return 0
    return _run_here(config, stages, started)


def _run_here(config: RunConfig, stages: "Stages", started: float) -> int:
    from framework.finish import finish_run
    from framework.launch.local import run_local
    from framework.launch.supervisor import (
        InterruptedRunError,
        RoleFailedError,
        UnstoppableError,
    )
    from framework.progress import ProgressView

    live = config.tracker.progress and sys.stdout.isatty()
    try:
        with ProgressView(config.name, sys.stdout, live=live) as view:
            run_local(stages, view.begin, view.tick if config.tracker.progress else lambda: None)
    except RoleFailedError as error:
        return _failed(str(error), error.tail[-20:])
    except (UnstoppableError, ValueError, OSError) as error:
        return _failed(str(error))
    except InterruptedRunError as error:
        print(f"drivetrain: {error}; every process has been stopped", file=sys.stderr)
        return 128 + error.signum
    print(finish_run(stages.main, time.monotonic() - started))
    return 0


def _failed(reason: str, details: Sequence[str] = ()) -> int:
    print(f"drivetrain: {reason}", file=sys.stderr)
    for line in details:
        print(f"    {line}", file=sys.stderr)
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
