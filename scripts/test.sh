#!/usr/bin/env bash
# Create the environment, install, check style and types, then run the tests that need no GPU. Arguments go to pytest.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
CDPATH="" cd -- "$(dirname -- "$0")/.."
. scripts/environment.sh
ensure_environment test
# A test that needs a missing model or dataset must fail instead of downloading it.
export HF_HUB_OFFLINE=1
python -m ruff check .
python -m ruff format --check --quiet .
python -m mypy --no-error-summary
# Many tests wait for subprocesses, so two workers take two thirds of the time. Each file is run by one worker.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -q --numprocesses 2 --dist loadfile "$@"
