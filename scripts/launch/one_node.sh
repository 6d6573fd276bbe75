#!/bin/sh
# Trains on all GPUs of one machine, or on the first GPUS of them:
#   [GPUS=4] scripts/launch/one_node.sh run.yaml [--any.field value]
# If a process dies, all end. With RESTARTS=3 they restart from the newest checkpoint, up to three times.
set -eu
# Do not import modules from the working directory, unless it is the root of this project.
[ -e retriever/__main__.py ] || export PYTHONSAFEPATH=1
exec torchrun --standalone --nproc-per-node="${GPUS:-gpu}" --max-restarts="${RESTARTS:-0}" -m retriever train "$@"
