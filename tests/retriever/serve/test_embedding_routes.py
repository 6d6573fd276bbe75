"""The embedding routes answer the Python clients of OpenAI and of Text Embeddings Inference with the right vectors."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
from in_thread import Running, running

from index.ann.index import Index
from retriever.encoding.encoder import EncodeOptions, embed_texts
from retriever.models.modality import load_towers
from retriever.models.towers import Towers
from retriever.serve.app import make_app
from retriever.serve.batching import Batching, Engine
from retriever.serve.embeddings import CHUNK
from retriever.serve.metrics import Metrics
from retriever.serve.requests import Limits

TEXTS = ["what is a cat?", "large tree that bears acorns", "z " * 100]
METRICS = Metrics()
LIMITS = Limits(inputs=CHUNK + 10, input=300)


@pytest.fixture(scope="module")
def towers(world: Any) -> Towers:
    towers = load_towers(str(world.model))
    # Queries and passages differ, so that the tests notice a confusion.
    towers.model.prompts.update({"query": "find: ", "document": ""})
    return towers


@pytest.fixture(scope="module")
def engine(world: Any, towers: Towers) -> Iterator[Engine]:
    index = Index.open(world.index)
    index.model = towers.fingerprint()
    with Engine(towers, index, EncodeOptions(), Batching(), METRICS.batch) as engine:
        yield engine


@pytest.fixture(scope="module")
def service(engine: Engine) -> Iterator[Running]:
    with running(make_app(engine, LIMITS, lambda line: None, name="org/model", metrics=METRICS)) as service:
        yield service


def expected(towers: Towers, side: Any, texts: list[str] = TEXTS) -> np.ndarray:
    return embed_texts(towers, texts, side, EncodeOptions())


def test_openais_client_gets_the_models_vectors(service: Running, towers: Towers) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(api_key="none", base_url=f"{service.url}/v1", max_retries=0) as client:
        names = [model.id for model in client.models.list()]
        assert names == ["org/model:query", "org/model:passage"]
        for name, side in zip(names, ("query", "document"), strict=True):
            # The client asks for base64 unless it is told otherwise.
            packed = client.embeddings.create(model=name, input=TEXTS)
            plain = client.embeddings.create(model=name, input=TEXTS, encoding_format="float")
            for answer in (packed, plain):
                found = np.array([item.embedding for item in answer.data], np.float32)
                np.testing.assert_allclose(found, expected(towers, side), rtol=1e-5, atol=1e-6)
                assert [item.index for item in answer.data] == [0, 1, 2] and answer.model == name
        tokens = [len(towers.tokenizer("document")([text]).ids) for text in TEXTS]
        assert packed.usage.prompt_tokens == sum(tokens) and max(tokens) == 64
        several = [f"text {n}" for n in range(CHUNK + 3)]
        answer = client.embeddings.create(model="org/model", input=several, extra_body={"input_type": "passage"})
        found = np.array([item.embedding for item in answer.data], np.float32)
        np.testing.assert_allclose(found, expected(towers, "document", several), rtol=1e-4, atol=1e-5)
        short = client.embeddings.create(model="org/model:passage", input="one", dimensions=8).data[0].embedding
        first = expected(towers, "document", ["one"])[0, :8]
        np.testing.assert_allclose(short, first / np.linalg.norm(first), rtol=1e-4)
        with pytest.raises(openai.NotFoundError, match="model: expected 'org/model', found 'gpt'"):
            client.embeddings.create(model="gpt", input="x")
        with pytest.raises(openai.UnprocessableEntityError, match="input_type: expected 'query' or 'passage'"):
            client.embeddings.create(model="org/model", input="x")
        with pytest.raises(openai.UnprocessableEntityError, match=r"input\[0\]: expected text \(token ids are not"):
            client.embeddings.create(model="org/model:query", input=[1, 2])


def test_hugging_faces_client_gets_the_models_vectors(
    service: Running, towers: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    # Tests run offline; the client would not ask this machine either.
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    for path in ("", "/embed"):
        client = hub.InferenceClient(service.url + path)
        found = client.feature_extraction(TEXTS, prompt_name="query", normalize=True, truncate=True)
        np.testing.assert_allclose(found, expected(towers, "query"), rtol=1e-5, atol=1e-6)
    found = client.feature_extraction("one", prompt_name="document")
    np.testing.assert_allclose(found, expected(towers, "document", ["one"]), rtol=1e-5, atol=1e-6)
    status, info = ask(service, "GET", "/info")
    assert status == 200 and info["model_sha"] == towers.fingerprint()["sha256"] and info["max_input_length"] == 64


def test_what_cannot_be_honored_is_refused_in_the_form_of_the_route(service: Running) -> None:
    for path, body, status, message in (
        (
            "/embed",
            {"inputs": ["x", "z " * 100], "prompt_name": "query", "truncate": False},
            413,
            "inputs[1]: expected at",
        ),
        ("/embed", {"inputs": "x", "prompt_name": "query", "normalize": False}, 422, "normalize: expected true"),
        ("/embed", {"inputs": "x", "prompt_name": "sts"}, 422, "prompt_name: expected query, passage, document"),
        ("/embed", {"inputs": "x", "prompt_name": "query", "truncation_direction": "Left"}, 422, "expected right"),
        ("/embed", {"inputs": [], "prompt_name": "query"}, 422, "inputs: expected a text or a list of texts"),
        ("/embed", {"inputs": ["x"] * 43, "prompt_name": "query"}, 422, "inputs: expected at most 42 texts, found 43"),
        ("/embed", {"inputs": "x" * 301, "prompt_name": "query"}, 413, "inputs[0]: expected at most 300 characters"),
        ("/embed", {"input": "x"}, 422, "found 'input'"),
    ):
        found, content = ask(service, "POST", path, body)
        assert found == status and message in content["error"] and content["error_type"] == "validation", content
    for name, value in (("dimensions", 33), ("dimensions", True), ("encoding_format", "int8"), ("input_type", "x")):
        body = {"model": "org/model:query", "input": "x", name: value}
        found, content = ask(service, "POST", "/v1/embeddings", body)
        assert found == 422 and content["error"]["message"].startswith(f"{name}: expected"), content
        assert content["error"]["type"] == "invalid_request_error"


def test_metrics_count_requests_and_texts(service: Running) -> None:
    before = metrics(service)
    ask(service, "POST", "/embed", {"inputs": TEXTS, "prompt_name": "query"})
    ask(service, "GET", "/nowhere/5")
    after = metrics(service)
    counts = {
        'retriever_requests_total{method="POST",route="/embed",status="200"}': 1,
        'retriever_requests_total{method="GET",route="other",status="404"}': 1,
        'retriever_embedded_total{side="query"}': 3,
        "retriever_batch_size_count": 1,
    }
    assert {name: after[name] - before.get(name, 0) for name in counts} == counts
    assert after['retriever_state{of="passages"}'] == 20 and after["process_open_fds"] > 0


def metrics(service: Running) -> dict[str, float]:
    """Name and labels -> value of every line that /metrics returns."""
    lines = ask(service, "GET", "/metrics")[1].splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def ask(service: Running, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """Status and content of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.request(method, path, None if body is None else json.dumps(body))
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, json.loads(text) if "json" in response.headers["content-type"] else text
