#!/usr/bin/env bash
# Set-up, lint, types, tests. Arguments go to pytest: scripts/test.sh tests/rollout -k buffer
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/install/setup.sh"
cd "$root"
if [ $# -ne 0 ]; then
  exec env OMP_NUM_THREADS=1 .venv/bin/python -m pytest "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/basedpyright & # beside the tests
types=$!
status=0
# Two at a time; tests/conftest.py keeps all that share the SGLang server in one of them.
env OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 || status=$?
wait "$types" || { echo "test.sh: basedpyright found errors, see above" >&2; status=1; }
exit "$status"
