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
ensure_environment quickstart
export HF_HUB_OFFLINE=1
cd "$called_from"
exec python "$house/scripts/emoji.py" "$@"
