#!/bin/sh
# Several machines, without a batch system. Run the same line on each; HEAD is one of them, whose port 29400 is free:
#   NODES=4 HEAD=node1 scripts/launch/several_nodes.sh run.yaml [--any.field value]
# They meet at HEAD in any order, and `out` in run.yaml lies on a disk that all of them see. With RESTARTS=3 on each, what
# dies starts again from the newest checkpoint.
set -eu
# Files in the working directory are not imported in the place of libraries, unless this project itself is there.
[ -e retriever/__main__.py ] || export PYTHONSAFEPATH=1
: "${NODES:?how many machines}" "${HEAD:?the machine where they meet}"
exec torchrun --nnodes="$NODES" --nproc-per-node="${GPUS:-gpu}" --max-restarts="${RESTARTS:-0}" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29400}" --rdzv-id="${JOB:-retriever}" \
    -m retriever train "$@"
