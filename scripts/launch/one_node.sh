#!/bin/sh
# Trains on all GPUs of one machine, or on the first GPUS of them:
#   [GPUS=4] scripts/launch/one_node.sh run.yaml [--any.field value]
# If a process dies, all end. With RESTARTS=3 they restart from the newest checkpoint, up to three times.
set -eu
[ $# -gt 0 ] || { echo "one_node.sh: expected a configuration: one_node.sh run.yaml [--any.field value]" >&2; exit 2; }
# Do not import modules from the working directory, unless it is the root of this project.
[ -e retriever/__main__.py ] || export PYTHONSAFEPATH=1
# A step and a checkpoint may take longer than torchrun's 30 s between SIGTERM and SIGKILL.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
exec torchrun --standalone --nproc-per-node="${GPUS:-gpu}" --max-restarts="${RESTARTS:-0}" -m retriever train "$@"
