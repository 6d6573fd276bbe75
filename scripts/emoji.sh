#!/usr/bin/env bash
# Environment, install, then pictures and texts on the bundled emoji: train, encode, index, search both ways, evaluate.
#
#   scripts/emoji.sh                  less than ten minutes on two CPU cores
#
# Everything it makes is in runs/emoji, or in the folder given by --out.
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
exec python "$house/scripts/emoji.py" "$@"
