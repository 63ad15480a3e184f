#!/usr/bin/env bash
# From a bare machine to a trained policy: set-up, then one run with real SGLang and megatron-core.
# Arguments are passed on as overrides: scripts/quickstart.sh num_steps=50 name=short
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/install/setup.sh"
cd "$root"
exec env OMP_NUM_THREADS=1 .venv/bin/drivetrain experiment=quickstart "$@"
