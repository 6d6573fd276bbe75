"""huggingface_hub's own client uploads a model over HTTP, downloads it at a revision, and lays out the cache itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import World
from hub_server import local_hub

import retriever

ROOT = Path(__file__).resolve().parents[3]


def run(*words: object, endpoint: str, cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own: the client reads its settings when it is imported."""
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_TOKEN": "hf_secret",
        # Large files are uploaded by the protocol of Git LFS, which needs no other server.
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


FIND = """
import sys
from retriever.models.loading.hub import local_model
try:
    print(local_model(sys.argv[1]))
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def found(name: str, **settings: Any) -> str:
    """The folder of a model in the cache of the hub, or the error."""
    return run("-c", FIND, name, **settings).stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_model_is_pushed_and_loaded_at_a_pinned_revision(world: World, tmp_path: Path) -> None:
    with local_hub() as hub:
        push = ("-m", "retriever", "push", "--model", world.model, "--repo", "acme/words", "--revision", "v1")
        refused = run(*push, endpoint=hub.url, cache=tmp_path, HF_TOKEN="hf_wrong")
        assert (
            refused.returncode == 1 and "acme/words: not pushed: " in refused.stderr and "Trace" not in refused.stderr
        )
        done = run(*push, endpoint=hub.url, cache=tmp_path)
        assert done.returncode == 0, done.stderr
        oid = hub.branches["acme/words", "v1"]
        assert f"acme/words@{oid}" in done.stdout and hub.private == {"acme/words": True}
        files = hub.commits[oid]
        assert files["model.safetensors"] == (world.model / "model.safetensors").read_bytes()
        assert b'SentenceTransformer("acme/words", revision="v1")' in files["README.md"]
        # A newer commit on the branch does not change what the pinned name loads.
        hub.branches["acme/words", "v1"] = hub.commit("acme/words", "v1", [])
        hub.commits[hub.branches["acme/words", "v1"]] = {**files, "README.md": b"newer"}
        pinned = f"acme/words@{oid}"
        folder = found(pinned, endpoint=hub.url, cache=tmp_path)
        assert folder.endswith(f"models--acme--words/snapshots/{oid}")
        assert any(line.startswith("GET /acme/words/resolve/") for line in hub.asked)
        asked = len(hub.asked)
        assert found(pinned, endpoint=hub.url, cache=tmp_path, HF_HUB_OFFLINE="1") == folder
        assert len(hub.asked) == asked
        assert found("acme/words@v9", endpoint=hub.url, cache=tmp_path).startswith("InputError: acme/words@v9: ")
    texts = ["what is a cat?", "define oak"]
    expected = retriever.load(world.model).encode_queries(texts)
    np.testing.assert_array_equal(retriever.load(folder).encode_queries(texts), expected)
