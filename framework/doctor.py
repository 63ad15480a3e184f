"""`drivetrain-doctor`: what this machine has and lacks, and what each lack costs.

Exit status 1 when the CPU path cannot run: a required package is missing or does not import.
"""

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

PINS = Path(__file__).resolve().parents[1] / "scripts" / "install"
IMPORT_TIMEOUT_S = 120.0


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    """Something is missing that this machine can do without."""
    WARN = "warn"
    """It may work; it is not what was tested."""
    FAIL = "FAIL"
    """The CPU path cannot run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the report."""

    level: Level
    what: str
    cost: str = ""
    """What follows from it, and what to do."""


def pinned_versions() -> dict[str, str]:
    """Package -> exact version of the CPU lists in scripts/install/; without a pin: ""."""
    pins: dict[str, str] = {}
    for path in sorted(PINS.glob("cpu*.txt")):
        for line in path.read_text(encoding="utf-8").splitlines():
            match = re.match(r"\s*([A-Za-z0-9_.-]+)\s*(?:==\s*([^\s;#]+))?", line.partition("#")[0])
            if match:
                pins[_normal(match.group(1))] = match.group(2) or ""
    return pins


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def check_python() -> Finding:
    """The interpreter."""
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] < (3, 13):
        return Finding(level=Level.OK, what=f"Python {version}")
    return Finding(
        level=Level.FAIL, what=f"Python {version}", cost="3.11 or 3.12 is needed; install one"
    )


def check_packages(pins: dict[str, str]) -> Iterator[Finding]:
    """Every package of the lists: is it there, in the version that was tested?"""
    if not pins:
        yield Finding(
            level=Level.WARN, what=f"no package lists in {PINS}", cost="versions not checked"
        )
    good = 0
    for name, wanted in pins.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(
                level=Level.FAIL,
                what=f"{name} is not installed",
                cost="run scripts/quickstart.sh, or install the lists in scripts/install/",
            )
            continue
        if wanted and installed.split("+")[0] != wanted:
            yield Finding(
                level=Level.WARN,
                what=f"{name} {installed}, tested with {wanted}",
                cost="it may work; the tests have not seen it",
            )
        else:
            good += 1
    yield Finding(level=Level.OK, what=f"{good} of {len(pins)} packages as in scripts/install/")


def check_imports() -> Iterator[Finding]:
    """The two giants really load here, each in a process of its own."""
    trials = {
        "megatron-core loads on this machine": "import framework.megatron.cpu\n"
        "from megatron.core.models.gpt import GPTModel",
        "SGLang's server loads on this machine": "from rollout.server import stubs\n"
        "stubs.install()\nimport sglang.srt.server_args",
        "torch.distributed has gloo": "import torch.distributed as d\n"
        "assert d.is_available() and d.is_gloo_available()",
    }
    for what, code in trials.items():
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                text=True,
                timeout=IMPORT_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            cost = f"no end within {IMPORT_TIMEOUT_S:g} s; is the machine overloaded?"
            yield Finding(level=Level.FAIL, what=f"not so: {what}", cost=cost)
            continue
        if done.returncode == 0:
            yield Finding(level=Level.OK, what=what)
        else:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            yield Finding(level=Level.FAIL, what=f"not so: {what}", cost=reason)


def check_gpu() -> Iterator[Finding]:
    """CUDA, and what makes it fast."""
    import torch

    if not torch.cuda.is_available():
        build = "a CUDA build" if torch.version.cuda else "a CPU build"
        yield Finding(
            level=Level.NOTE,
            what=f"no GPU (torch {torch.__version__}, {build})",
            cost="everything runs on the CPU, by gloo: right, slow, fit for small models",
        )
        return
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding(level=Level.OK, what=f"{len(names)} GPUs: {', '.join(sorted(set(names)))}")
    if importlib.util.find_spec("transformer_engine") is None:
        yield Finding(
            level=Level.WARN,
            what="transformer-engine is not installed",
            cost="no fused attention, no fp8; see scripts/install/gpu.txt",
        )
    yield check_apex()


def check_apex() -> Finding:
    """NVIDIA's apex is built from source; the registry's package of that name is another one."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Finding(
            level=Level.NOTE,
            what="apex is not installed",
            cost="no fused Adam and no gradient-accumulation fusion: steps are slower",
        )
    folder = Path(next(iter(spec.submodule_search_locations or [str(spec.origin)])))
    if not (folder / "multi_tensor_apply").is_dir():
        return Finding(
            level=Level.WARN,
            what=f"the package apex at {folder} is not NVIDIA's",
            cost="the registry's `apex` is a web framework: pip uninstall apex, "
            "then build github.com/NVIDIA/apex from source",
        )
    return Finding(level=Level.OK, what="NVIDIA apex")


def check_machine() -> Iterator[Finding]:
    """Cores, memory, Slurm."""
    import os

    import psutil

    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory().available / 2**30
    yield Finding(level=Level.OK, what=f"{cores} cores, {memory:.1f} GiB of memory free")
    if cores < 2:
        yield Finding(
            level=Level.NOTE, what="one core", cost="engine and trainer take turns: twice as slow"
        )
    if memory < 6:
        yield Finding(
            level=Level.WARN,
            what=f"{memory:.1f} GiB of memory free",
            cost="a run on the CPU needs about 5 GiB: an engine 2, a trainer rank 1",
        )
    if shutil.which("sbatch") is None:
        yield Finding(
            level=Level.NOTE,
            what="no Slurm (sbatch)",
            cost="cluster=slurm can only show its script; cluster=local and manual work",
        )
    else:
        yield Finding(level=Level.OK, what="Slurm: sbatch is here")


def examine() -> list[Finding]:
    """Everything, in the order it is told. Packages that fail end the examination early."""
    pins = pinned_versions()
    findings = [check_python(), *check_packages(pins)]
    if any(finding.level is Level.FAIL for finding in findings):
        return findings
    return [*findings, *check_imports(), *check_gpu(), *check_machine()]


def main() -> int:
    """Print the findings; 1 when the CPU path cannot run, else 0."""
    findings = examine()
    for finding in findings:
        print(f"[{finding.level:>4}] {finding.what}")
        if finding.cost:
            print(f"       {finding.cost}")
    failed = sum(finding.level is Level.FAIL for finding in findings)
    if failed:
        message = f"{failed} thing(s) keep the CPU path from running"
        print(f"drivetrain-doctor: {message}", file=sys.stderr)
        return 1
    print("The CPU path can run.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
