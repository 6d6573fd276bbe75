#!/bin/sh
# Trains on several machines without a batch system. Run the same command on each. HEAD is one of them, with a free port
# 29400:
#   NODES=4 HEAD=node1 scripts/launch/several_nodes.sh run.yaml [--any.field value]
# They may start in any order. `out` in run.yaml must be on a shared file system. With RESTARTS=3 on each, processes that
# die restart from the newest checkpoint.
set -eu
# Do not import modules from the working directory, unless it is the root of this project.
[ -e retriever/__main__.py ] || export PYTHONSAFEPATH=1
: "${NODES:?expected the number of machines}" "${HEAD:?expected the name of the first machine}"
exec torchrun --nnodes="$NODES" --nproc-per-node="${GPUS:-gpu}" --max-restarts="${RESTARTS:-0}" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29400}" --rdzv-id="${JOB:-retriever}" \
    -m retriever train "$@"
