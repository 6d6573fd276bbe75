# dense-retriever on a CPU: commands, Python API and the HTTP service. From the root of the checkout:
#
#   docker build -f scripts/docker/cpu.Dockerfile -t dense-retriever:cpu .
#   docker run --rm -v "$PWD:/data" dense-retriever:cpu train run.yaml
#   docker run --rm -p 8000:8000 -v "$PWD:/data" dense-retriever:cpu \
#       serve --model runs/first/model --index runs/first/index --host 0.0.0.0 --token-file token.txt
FROM python:3.12-slim

WORKDIR /opt/dense-retriever
# The CPU build of PyTorch, which is much smaller than that of the package index. Installed first: it changes rarely.
COPY constraints.txt ./
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
        "torch$(sed -n 's/^torch\(==[0-9.]*\).*/\1/p' constraints.txt)"
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY losses losses
COPY index index
COPY eval eval
COPY retriever retriever
RUN pip install --no-cache-dir -c constraints.txt ".[bm25,hub,plot,serve,tensorboard]"

# Models of the hub are downloaded to the mounted folder, where they are found again.
ENV HF_HOME=/data/.huggingface
WORKDIR /data
ENTRYPOINT ["retriever"]
CMD ["--help"]
