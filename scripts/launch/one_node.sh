#!/bin/sh
# All GPUs of one machine, or as many processes as GPUS says:
#   [GPUS=4] scripts/launch/one_node.sh run.yaml [--any.field value]
# A process that dies ends all of them. With RESTARTS=3 they start again from the newest checkpoint, up to three times.
set -eu
# Files in the working directory are not imported in the place of libraries, unless this project itself is there.
[ -e retriever/__main__.py ] || export PYTHONSAFEPATH=1
exec torchrun --standalone --nproc-per-node="${GPUS:-gpu}" --max-restarts="${RESTARTS:-0}" -m retriever train "$@"
