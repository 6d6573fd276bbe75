# dense-retriever on NVIDIA GPUs. From the root of the checkout, with the NVIDIA Container Toolkit:
#
#   docker build -f scripts/docker/gpu.Dockerfile -t dense-retriever:gpu .
#   docker run --rm --gpus all --ipc host -v "$PWD:/data" dense-retriever:gpu train run.yaml
#   docker run --rm --gpus all --ipc host -v "$PWD:/data" --entrypoint torchrun dense-retriever:gpu \
#       --nproc-per-node 8 -m retriever train run.yaml
#
# --ipc host: processes that prepare data, and NCCL, use shared memory.
FROM python:3.12-slim

# Triton compiles the launchers of its kernels with a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/dense-retriever
# PyTorch's package for Linux brings the CUDA libraries. Installed first: it changes rarely.
COPY constraints.txt ./
RUN pip install --no-cache-dir "torch$(sed -n 's/^torch\(==[0-9.]*\).*/\1/p' constraints.txt)"
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY losses losses
COPY index index
COPY eval eval
COPY retriever retriever
RUN pip install --no-cache-dir -c constraints.txt ".[gpu,bm25,hub,plot,serve,tensorboard]"

# Models of the hub are downloaded to the mounted folder, where they are found again.
ENV HF_HOME=/data/.huggingface
WORKDIR /data
ENTRYPOINT ["retriever"]
CMD ["--help"]
