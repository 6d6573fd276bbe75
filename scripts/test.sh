#!/usr/bin/env bash
# Environment, install, style and types, then the tests that need no GPU. Arguments go to pytest.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
. scripts/environment.sh
ensure_environment test
# A model or data set that is not on the machine must fail a test, not download.
export HF_HUB_OFFLINE=1
python -m ruff check .
python -m ruff format --check --quiet .
python -m mypy --no-error-summary
# Many tests wait for processes of their own: two at a time, each file's by one, take two thirds of what they take in turn.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -q --numprocesses 2 --dist loadfile "$@"
