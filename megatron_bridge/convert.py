"""`drivetrain-convert to-megatron | to-hf | merge | verify`: from form to form, offline.

Exit status: 0 done; 1 `verify` found errors, or a conversion failed; 2 an argument or a checkpoint
was refused, nothing was written. The reason is on stderr, one line each.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from megatron_bridge.layout import Layout

EXIT_FAILED = 1
EXIT_REFUSED = 2
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class _Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"drivetrain-convert: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(EXIT_REFUSED)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `drivetrain-convert`; returns the exit status."""
    arguments = parser().parse_args(argv)
    commands = {"to-megatron": to_megatron, "to-hf": to_hf, "merge": merge, "verify": verify}
    try:
        return commands[arguments.command](arguments)
    except ValueError as error:
        lines, status = str(error).splitlines(), EXIT_REFUSED
    except OSError as error:
        lines, status = [str(error)], EXIT_FAILED
    except KeyboardInterrupt:
        lines, status = ["ended by SIGINT"], 130
    for line in lines:
        print(f"drivetrain-convert: {line}", file=sys.stderr)
    return status


SIZES = {
    "tp": (1, "tensor-parallel ranks"),
    "pp": (1, "pipeline stages"),
    "vpp": (1, "model chunks per stage"),
    "cp": (1, "context-parallel ranks"),
    "ep": (1, "ranks that share a layer's experts"),
    "etp": (1, "ranks that an expert is cut over"),
    "dp": (0, "replicas (0: as few as ep * etp needs)"),
    "first-stage-layers": (0, "layers of the first stage (0: an even share)"),
    "last-stage-layers": (0, "layers of the last stage (0: an even share)"),
    "vocab-pad-multiple": (8, "the vocabulary is padded to a multiple of this times tp"),
}
"""Options of `verify`: default and meaning."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(prog="drivetrain-convert", description="Hugging Face <-> Megatron, bit for bit.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    there = commands.add_parser("to-megatron", help="a torch_dist checkpoint of a model's weights")
    back = commands.add_parser("to-hf", help="a Hugging Face directory from a checkpoint")
    whole = commands.add_parser("merge", help="a model with a PEFT adapter in its weights")
    check = commands.add_parser("verify", help="load on every rank of a layout, export, compare")
    _add_path(there, "hf_dir", "config.json and safetensors")
    _add_path(back, "ckpt_dir", "RUN/checkpoints/step_000010, or what to-megatron wrote")
    _add_path(check, "hf_dir", "config.json and safetensors")
    _add_path(whole, "hf_dir", "the model without adapters")
    _add_path(whole, "adapter_dir", "adapter_config.json and adapter_model.safetensors")
    for command in (there, back, whole):
        _add_path(command, "out_dir", "appears when it is complete; absent or empty before")
        size = command.add_argument("--max-shard-size", type=size_bytes, metavar="SIZE")
        size.default, size.help = size_bytes("5GB"), "of a file: 5GB (the default), 500MB, ..."
    like = back.add_argument("--like", type=Path, required=True, metavar="HF_DIR")
    like.help = "whose config.json, tokenizer and generation files are copied"
    fp8 = back.add_argument("--fp8", action="store_true")
    fp8.help = "linear weights in float8_e4m3fn with a scale for every 128 x 128 block"
    for name, (default, what) in SIZES.items():
        check.add_argument(f"--{name}", type=int, default=default, metavar="N", help=what)
    check.add_argument("--spec", choices=("torch", "te"), help="layer spec (default: both)")
    return top


def _add_path(command: argparse.ArgumentParser, name: str, what: str) -> None:
    command.add_argument(name, type=Path, metavar=name.upper(), help=what)


def size_bytes(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; one such as 5GB or 500MB is wanted")
    return size


def to_megatron(arguments: argparse.Namespace) -> int:
    """HF_DIR -> a torch_dist checkpoint that model.init_from= accepts."""
    from megatron_bridge import conversion

    with _Bar("to-megatron") as bar:
        done = conversion.to_megatron(
            arguments.hf_dir, arguments.out_dir, arguments.max_shard_size, bar.show
        )
    bar.report(f"{done.num_tensors} tensors", done.size_bytes, str(arguments.out_dir))
    return 0


def to_hf(arguments: argparse.Namespace) -> int:
    """CKPT_DIR -> a Hugging Face directory."""
    from megatron_bridge import conversion

    with _Bar("to-hf") as bar:
        done = conversion.to_hf(
            arguments.ckpt_dir,
            arguments.out_dir,
            arguments.like,
            arguments.max_shard_size,
            bar.show,
            fp8=arguments.fp8,
        )
    kept = f", {done.kept_files} files kept of a conversion that was cut off"
    what = f"{done.num_tensors} tensors{kept if done.kept_files else ''}"
    bar.report(what, done.size_bytes, str(arguments.out_dir))
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """HF_DIR with the adapters of ADAPTER_DIR in its weights."""
    from megatron_bridge import conversion

    with _Bar("merge") as bar:
        done = conversion.merge(
            arguments.hf_dir,
            arguments.adapter_dir,
            arguments.out_dir,
            arguments.max_shard_size,
            bar.show,
        )
    bar.report(f"{done.num_tensors} tensors", done.size_bytes, str(arguments.out_dir))
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """HF_DIR through every rank of a layout and back."""
    layout = _layout(arguments)
    from megatron_bridge.hf_checkpoint import HfCheckpoint
    from megatron_bridge.models.architecture import Spec
    from megatron_bridge.table_check import check
    from megatron_bridge.verify import verify_hf

    multiple = arguments.vocab_pad_multiple
    if not arguments.hf_dir.is_dir():
        raise ValueError(f"HF_DIR={arguments.hf_dir} is not a directory")
    specs = [Spec(arguments.spec)] if arguments.spec else list(Spec)
    found: dict[str, list[str]] = {}  # error -> specs
    with _Bar("verify") as bar, HfCheckpoint(arguments.hf_dir) as checkpoint:
        wrong = [e for e in check(checkpoint.config, layout, multiple) if "parallel." in e]
        if wrong:
            raise ValueError(_as_options("\n".join(wrong)))
        for spec in specs:
            done = verify_hf(checkpoint, layout, multiple, spec, bar.show)
            for error in done.errors:
                found.setdefault(error, []).append(spec)
    for error, where in found.items():
        only = f"{where[0]} spec: " if len(where) < len(specs) else ""
        print(f"drivetrain-convert: {only}{error}", file=sys.stderr)
    what = f"{layout.world_size} ranks, {done.num_tensors} tensors"
    bar.report(what, done.size_bytes, f"{len(found)} errors" if found else "bit-exact")
    return EXIT_FAILED if found else 0


def _layout(arguments: argparse.Namespace) -> "Layout":
    """The layout that is asked for; ValueError tells of it in the names of the options."""
    from megatron_bridge.layout import Layout, padded_vocab_size

    sizes = {name: getattr(arguments, name) for name in map(_key, SIZES)}
    multiple = sizes.pop("vocab_pad_multiple")
    stage, experts = arguments.tp * arguments.cp, arguments.ep * arguments.etp
    sizes["dp"] = sizes["dp"] or max(1, experts // max(1, gcd(experts, stage)))
    try:
        padded_vocab_size(1, multiple, 1)
        return Layout(**sizes)
    except ValueError as error:
        raise ValueError(_as_options(str(error))) from None


def _key(option: str) -> str:
    return option.replace("-", "_")


def _as_options(text: str) -> str:
    """A message about configuration keys, about the options of the same name."""
    names = r"(?:parallel|model)\.(\w+)"
    return re.sub(names, lambda match: "--" + match[1].replace("_", "-"), text)


class _Bar:
    """Progress on stderr where it is a terminal, and the line that says how it went."""

    def __init__(self, command: str) -> None:
        self._command, self._started = command, time.monotonic()
        self._progress: Any = None

    def __enter__(self) -> "_Bar":
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._progress = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._progress.add_task(self._command, total=None)
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, done: int, total: int) -> None:
        """So many bytes are done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total)

    def report(self, what: str, size: int, outcome: str) -> None:
        """The last line, on stdout."""
        seconds = time.monotonic() - self._started
        rate = size / 1e9 / max(seconds, 1e-9)
        print(
            f"drivetrain-convert: {self._command}: {what}, {size / 1e6:.1f} MB, {seconds:.1f} s "
            f"({rate:.2f} GB/s): {outcome}"
        )


if __name__ == "__main__":
    sys.exit(main())
