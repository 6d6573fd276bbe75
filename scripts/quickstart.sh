#!/usr/bin/env bash
# Create the environment, install, then train, encode, index, search and evaluate on the bundled data.
#
#   scripts/quickstart.sh             verbs of WordNet, a few minutes on two CPU cores
#   scripts/quickstart.sh --pos all   all of WordNet
#   scripts/quickstart.sh --keep      also show this run in README.md: its table, and a screenshot of its report
#
# All results are in runs/quickstart, or in the folder given by --out.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
called_from=$PWD
CDPATH="" cd -- "$(dirname -- "$0")/.."
root=$PWD
. scripts/environment.sh
active=${VIRTUAL_ENV:-}
ensure_environment quickstart
# The last lines of the output show how to activate the environment, unless the calling shell has.
[ "$active" = "$VIRTUAL_ENV" ] || export RETRIEVER_ENVIRONMENT=$VIRTUAL_ENV
export HF_HUB_OFFLINE=1
cd "$called_from"
exec python "$root/scripts/quickstart.py" "$@"
