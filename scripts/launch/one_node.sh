#!/bin/sh
# All GPUs of one machine, or as many processes as GPUS says:
#   [GPUS=4] scripts/launch/one_node.sh run.yaml [--any.field value]
# A process that dies ends all of them; they start again from the newest checkpoint, at most RESTARTS times.
set -eu
exec torchrun --standalone --nproc-per-node="${GPUS:-gpu}" --max-restarts="${RESTARTS:-3}" -m retriever train "$@"
