#!/usr/bin/env bash
# Environment, install, then the main job on the bundled data: train, encode, index, search, evaluate.
#
#   scripts/quickstart.sh             verbs of WordNet, a few minutes on two CPU cores
#   scripts/quickstart.sh --pos all   the whole of WordNet: every definition, every headword
#   scripts/quickstart.sh --keep      and show this run in README.md: its table, and a picture of its report
#
# Everything it makes is in runs/quickstart, or in the folder given by --out.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
called_from=$PWD
CDPATH="" cd -- "$(dirname -- "$0")/.."
house=$PWD
. scripts/environment.sh
active=${VIRTUAL_ENV:-}
ensure_environment quickstart
# The closing lines say how to enter an environment that the calling shell is not in.
[ "$active" = "$VIRTUAL_ENV" ] || export RETRIEVER_ENVIRONMENT=$VIRTUAL_ENV
export HF_HUB_OFFLINE=1
cd "$called_from"
exec python "$house/scripts/quickstart.py" "$@"
