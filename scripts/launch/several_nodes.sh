#!/bin/sh
# Trains on several machines without a batch system. Run the same command on each. HEAD is one of them, with a free port
# 29400:
#   NODES=4 HEAD=node1 scripts/launch/several_nodes.sh run.yaml [--any.field value]
# They may start in any order. `out` in run.yaml must be on a shared file system. With RESTARTS=3 on each, processes that
# die restart from the newest checkpoint.
set -eu
[ $# -gt 0 ] || { echo "several_nodes.sh: expected a configuration: several_nodes.sh run.yaml" >&2; exit 2; }
# Do not import modules from the working directory, unless it is the root of this project.
[ -e retriever/__main__.py ] || export PYTHONSAFEPATH=1
: "${NODES:?expected the number of machines}" "${HEAD:?expected the name of the first machine}"
# A step and a checkpoint may take longer than torchrun's 30 s between SIGTERM and SIGKILL.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
exec torchrun --nnodes="$NODES" --nproc-per-node="${GPUS:-gpu}" --max-restarts="${RESTARTS:-0}" \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29400}" --rdzv-id="${JOB:-retriever}" \
    -m retriever train "$@"
