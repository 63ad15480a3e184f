"""One SGLang server as a process of ours: started with a bound, watched, ended as a whole.

`drivetrain-engine --run-dir RUN [--index 0]` runs one engine in the foreground: it writes its
address to the run directory, its log to logs/engine_<index>.log, and ends on SIGTERM or SIGINT;
`--side-model NAME` runs a frozen model beside the policy instead (side_model.py).
"""

import argparse
import glob
import os
import sys
from pathlib import Path
from typing import Any

import httpx

from rollout.config import EngineConfig, load_rollout_run
from rollout.process import RESTARTS, follow_launcher
from rollout.run_dir import RunDir
from rollout.server import delta, direct
from rollout.server.arguments import check_names, command_line
from rollout.server.server_process import ServerError, ServerProcess, end_on_signals
from rollout.side_models import role_of

EXACT_FLOAT32 = {"TRITON_F32_DEFAULT": "ieee", "NVIDIA_TF32_OVERRIDE": "0"}
"""What Triton's and cuBLAS's matrix products of float32 need on a GPU to be float32's: each takes
TF32 else, and log-probs of a two-layer model are off by 8e-3, which the gate refuses."""
_LAUNCH = "rollout.server.launch"
_HOLD_TIMEOUT_S = 60.0


def resolve_device(device: str) -> str:
    """auto -> cuda where this process may use an NVIDIA device, else cpu."""
    if device != "auto":
        return device
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1")
    return "cuda" if visible and glob.glob("/dev/nvidia[0-9]*") else "cpu"


class EngineProcess(ServerProcess):
    """A running SGLang server. Use as a context manager, or call stop()."""

    def __init__(
        self, *, config: EngineConfig, model_path: str, api_key: str, log_path: Path, index: int = 0
    ) -> None:
        if errors := check_names(config.args):
            raise ValueError("; ".join(errors))
        if not Path(model_path, "config.json").is_file():
            raise ValueError(f"model.hf_path={model_path!r}: holds no config.json")
        super().__init__(
            name=f"engine_{index}",
            host=config.host,
            start_timeout_s=config.start_timeout_s,
            log_path=log_path,
        )
        self.config = config
        self.model_path = model_path
        self.api_key = api_key
        self.device = resolve_device(config.device)

    def command(self, port: int) -> list[str]:
        """Our launch module with SGLang's arguments."""
        return [sys.executable, "-m", _LAUNCH, *command_line(self.arguments(port))]

    def arguments(self, port: int) -> dict[str, Any]:
        """Every SGLang argument of this server by its field name."""
        config = self.config
        arguments: dict[str, Any] = {
            "model_path": self.model_path,
            "host": config.host,
            "port": port,
            "dtype": config.dtype,
            "tp_size": config.tp,
            "max_total_tokens": config.max_total_tokens,
            "max_running_requests": config.max_running_requests,
            "enable_deterministic_inference": config.deterministic,
            "enable_return_routed_experts": config.return_routes,
            "weight_version": "0",
            "sleep_on_idle": True,
            "skip_server_warmup": True,
        }
        if self.device == "cpu":
            arguments |= {"device": "cpu", "attention_backend": "torch_native"}
            arguments["disable_radix_cache"] = config.deterministic
        elif config.colocated:
            arguments["enable_memory_saver"] = True
        arguments |= config.args
        theirs = config.args.get("custom_weight_loader") or []
        return arguments | {"custom_weight_loader": [direct.LOADER, delta.LOADER, *theirs]}

    def hold(self) -> None:
        """Generate nothing until somebody lets it continue: requests that come meanwhile wait."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        reply = httpx.post(
            f"{self.url}/pause_generation",
            json={"mode": "retract"},
            headers=headers,
            timeout=_HOLD_TIMEOUT_S,
            trust_env=False,
        )
        if reply.status_code != 200:
            raise ServerError(f"{self.name}: /pause_generation: {reply.status_code} {reply.text}")

    def environment(self) -> dict[str, str]:
        """The server's environment variables: ours and what it needs."""
        from rollout.server.launch import API_KEY

        environment = super().environment() | {API_KEY: self.api_key, "HF_HUB_OFFLINE": "1"}
        if self.device == "cpu":
            cpus = sorted(os.sched_getaffinity(0))
            binding = "|".join(str(cpus[rank % len(cpus)]) for rank in range(self.config.tp))
            environment |= {
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
                "TORCH_COMPILE_DISABLE": "1",
                "SGLANG_CPU_OMP_THREADS_BIND": binding,
            }
        elif self.config.dtype == "float32":
            environment = EXACT_FLOAT32 | environment
        return environment


def serve(run_dir: RunDir, index: int) -> int:
    """Run engine `index` of a run until it ends or is told to; the exit status."""
    run = load_rollout_run(run_dir.config)
    config = run.rollout.engine
    # Trainers push their weights; without them the engine serves what the run starts from.
    standalone = run.mode in ("rollout_only", "eval")
    model_path = (run.model.init_from if standalone else "") or run.model.hf_path
    role = f"engine_{index}"
    engine = EngineProcess(
        config=config,
        model_path=model_path,
        api_key=config.api_key or run_dir.token(),
        log_path=run_dir.log(role),
        index=index,
    )
    with engine:
        # No token before the trainers' weights are in it. The router cannot meet an engine that is
        # held; at a run's start nobody asks for tokens before the first push anyway.
        again = int(os.environ.get(RESTARTS, "0"))
        if not standalone and (again or not config.router):
            engine.hold()
        run_dir.write_address(role, engine.url)
        print(f"{role}: serving {model_path} at {engine.url}", flush=True)
        try:
            status = engine.wait()
        finally:
            run_dir.remove_address(role)
        raise ServerError(f"{role} ended with status {status}; {engine.tail()}")


def main() -> None:
    """`drivetrain-engine`: exit 0 when told to end, 1 when the server failed, 2 when refused."""
    parser = argparse.ArgumentParser(prog="drivetrain-engine", description=__doc__)
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--side-model", metavar="NAME", default="")
    arguments = parser.parse_args()
    side_model = arguments.side_model
    role = role_of(side_model) if side_model else f"engine_{arguments.index}"
    follow_launcher()
    end_on_signals()
    run_dir = RunDir(arguments.run_dir)
    try:
        with run_dir.hold(role):
            if side_model:
                from rollout.server.side_model import serve_side_model

                serve_side_model(run_dir, side_model)
            else:
                serve(run_dir, arguments.index)
    except ServerError as error:
        sys.exit(f"drivetrain-engine: {error}")
    except ValueError as error:
        print(f"drivetrain-engine: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
