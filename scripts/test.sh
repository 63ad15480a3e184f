#!/usr/bin/env bash
# Set-up, lint, types, tests. Arguments go to pytest: scripts/test.sh tests/rollout -k buffer
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/install/setup.sh"
cd "$root"
if [ $# -eq 0 ]; then
  .venv/bin/ruff check .
  .venv/bin/ruff format --check .
  .venv/bin/basedpyright
  # Two at a time; tests/conftest.py keeps all that share the SGLang server in one of them.
  set -- -n 2
fi
exec env OMP_NUM_THREADS=1 .venv/bin/python -m pytest "$@"
