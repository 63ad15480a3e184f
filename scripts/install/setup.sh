#!/usr/bin/env bash
# Bring a bare machine (Python 3.11 or 3.12, no GPU) to work: .venv with the exact versions of
# cpu.txt and cpu-nodeps.txt, and drivetrain itself, editable. Done once; later calls return at once.
# PYTHON=... chooses the interpreter. A GPU machine installs gpu.txt instead: see its first lines.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
here=$root/scripts/install
python=${PYTHON:-python3}

"$python" - <<'PY'
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 12):
    sys.exit(f"setup: {sys.executable} is Python {sys.version.split()[0]}; "
             "3.11 or 3.12 is needed (set PYTHON=/path/to/python3.11)")
PY

stamp=$root/.venv/.drivetrain-installed
wanted=$(cat "$here"/cpu*.txt "$root/pyproject.toml" | sha256sum | cut -d' ' -f1)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  exit 0
fi

echo "setup: installing into $root/.venv (about two minutes, once)" >&2
rm -f "$stamp"
[ -x "$root/.venv/bin/python" ] || "$python" -m venv "$root/.venv"
pip=("$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile)
quiet() { # pip's notes on stderr are kept for the case that it fails
  local log
  log=$(mktemp)
  "$@" 2>"$log" || { cat "$log" >&2; rm -f "$log"; return 1; }
  rm -f "$log"
}
quiet "${pip[@]}" -r "$here/cpu.txt" -c "$here/cpu-constraints.txt"
# sglang's own dependencies are CUDA wheels; megatron-core declares Python 3.12 but runs on 3.11.
quiet "${pip[@]}" --no-deps --ignore-requires-python -r "$here/cpu-nodeps.txt"
quiet "${pip[@]}" --no-deps --editable "$root"

# Bytecode for what a run imports, and no more. Without it every process of every run compiles
# torch, SGLang and megatron-core anew (a minute and a half more per start); containers often set
# PYTHONDONTWRITEBYTECODE, so it is written here.
compile() {
  quiet env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 "$root/.venv/bin/python" -c "$1" >/dev/null
}
(
  cd "$root"
  compile "import rollout.server.launch, rollout.main
import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler, sglang.srt.models.registry" &
  compile "import framework.main, framework.trainer, framework.tiny_model, framework.demonstrations
import framework.megatron.checkpoint, framework.megatron.model, framework.weight_sync
import framework.metrics, megatron_bridge.save, torch.distributed.run, torch.utils.tensorboard
from transformers import AutoTokenizer, PreTrainedTokenizerFast"
  wait $!
)
echo "$wanted" >"$stamp"
