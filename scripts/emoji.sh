#!/usr/bin/env bash
# Create the environment, install, then train, encode, index, search by text and by image, and evaluate on bundled emoji.
#
#   scripts/emoji.sh                  less than ten minutes on two CPU cores
#
# All results are in runs/emoji, or in the folder given by --out.
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
exec python "$root/scripts/emoji.py" "$@"
