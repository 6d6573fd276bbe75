#!/bin/sh
# All GPUs of one machine, or as many processes as GPUS says:
#   [GPUS=4] scripts/launch/one_node.sh run.yaml [--any.field value]
# A process that dies ends all of them. With RESTARTS=3 they start again from the newest checkpoint, up to three times.
set -eu
exec torchrun --standalone --nproc-per-node="${GPUS:-gpu}" --max-restarts="${RESTARTS:-0}" -m retriever train "$@"
