from __future__ import annotations

import sys

import faiss
import numpy as np
import pytest

from index.ann import on_disk as lists_on_disk
from index.ann.factory import bytes_per_vector, choose, explain, has_even_norms, import_faiss, memory, reason_of_choice
from index.files import InputError


@pytest.mark.parametrize(
    ("rows", "factory"),
    [(1, "Flat"), (199_999, "Flat"), (200_000, "IVF4096,Flat"), (5_000_000, "IVF16384_HNSW32,Flat")],
)
def test_choose_depends_on_size(rows: int, factory: str) -> None:
    assert choose(rows, 64) == factory


@pytest.mark.parametrize(
    ("rows", "mib", "factory"),
    [
        (100_000, 300, "Flat"),
        (100_000, 292, "SQfp16"),
        (100_000, 100, "SQ8"),
        (100_000, 20, "PQ384x4fs"),
        (1_000_000, 3000, "IVF4096,Flat"),
        (1_000_000, 1000, "IVF4096,SQ8"),
        (10_000_000, 40_000, "IVF65536_HNSW32,Flat"),
        (10_000_000, 3_000, "IVF65536_HNSW32,PQ384x4fs"),
    ],
)
def test_choose_takes_the_finest_codes_within_the_budget(rows: int, mib: float, factory: str) -> None:
    assert choose(rows, 768, mib) == factory
    assert memory(factory, rows, 768) <= mib * 2**20
    assert f"within {mib:,g} MiB" in explain(factory, rows, 768, mib)


def test_too_small_a_budget_names_the_required_memory() -> None:
    with pytest.raises(InputError, match=r"memory_budget_mib: expected at least 65\.5 for 1,000,000 .* found 10"):
        choose(1_000_000, 768, 10)
    assert choose(1_000_000, 768, 65.5) == "IVF4096,PQ96x4fs"
    with pytest.raises(InputError, match=r"expected at least 0\.0000954 for 100 .* found 1e-05"):
        choose(100, 4, 0.00001)
    for dim in (1, 2, 3, 7, 13):
        assert choose(1000, dim, 1) == "Flat"


def test_explain_refuses_a_factory_beyond_the_budget() -> None:
    with pytest.raises(InputError, match=r"at least 0\.586 for 400 passages of 384 dimensions \(Flat\), found 0\.1"):
        explain("Flat", 400, 384, 0.1)


@pytest.mark.parametrize(
    ("rows", "factory"),
    [
        (1, "IVF1,Flat"),
        (400, "IVF8,Flat"),
        (199_999, "IVF4096,Flat"),
        (210_000, "IVF4096,Flat"),
        (10_000_000, "IVF65536_HNSW32,SQ8"),
    ],
)
def test_choose_on_disk_returns_a_supported_type(rows: int, factory: str) -> None:
    for memory_mib, even_norms in ((None, True), (0.001, True), (None, False)):
        assert choose(rows, 768, memory_mib, even_norms=even_norms, on_disk=True) == factory
    index = faiss.index_factory(768, factory, faiss.METRIC_INNER_PRODUCT)
    lists_on_disk.check_supported(index, "--on-disk")


@pytest.mark.parametrize(
    ("rows", "mib", "how", "reason"),
    [
        (400, None, {}, "fewer than 200,000 passages"),
        (400, 5, {}, "fewer than 200,000 passages"),
        (400, 0.5, {}, "fewer than 200,000 passages and the memory budget"),
        (300_000, None, {}, "200,000 passages or more"),
        (300_000, None, {"even_norms": False}, "200,000 passages or more and vectors of uneven length"),
        (5_000_000, None, {"on_disk": True}, "2,000,000 passages or more and an index on disk"),
        (10_000_000, None, {}, "10,000,000 passages or more"),
        (10_000_000, 1_500, {}, "10,000,000 passages or more and the memory budget"),
    ],
)
def test_reason_of_choice(rows: int, mib: float | None, how: dict[str, bool], reason: str) -> None:
    factory = choose(rows, 384, mib, **how)
    assert reason_of_choice(factory, rows, 384, on_disk=how.get("on_disk", False)) == reason


def test_uneven_norms_choose_hnsw(rng) -> None:
    vectors = rng.standard_normal((5000, 64))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert has_even_norms(vectors)
    assert not has_even_norms(vectors * np.exp(0.3 * rng.standard_normal((5000, 1))))
    assert choose(1_000_000, 64, even_norms=False) == "HNSW32"
    assert choose(1_000_000, 64, 300, even_norms=False).startswith("IVF4096,")
    assert choose(1000, 64, even_norms=False) == "Flat"


@pytest.mark.parametrize("rows", [200_000, 1_999_999, 2_000_000, 9_999_999, 10_000_000, 1_000_000_000])
def test_every_choice_has_enough_training_vectors(rows: int) -> None:
    index = faiss.index_factory(64, choose(rows, 64), faiss.METRIC_INNER_PRODUCT)
    assert rows >= 39 * faiss.extract_index_ivf(index).nlist


@pytest.mark.parametrize(
    ("factory", "size"),
    [
        ("Flat", 3072),
        ("SQfp16", 1536),
        ("SQ8", 768),
        ("OPQ64,PQ64", 64),
        ("OPQ64,IVF256,PQ64", 64 + 8),
        ("IVF256,Flat", 3072 + 8),
        ("PQ64x4fs,RFlat", 32 + 3072),
        ("PCA64,Flat", 256),
    ],
)
def test_bytes_per_vector_include_code_and_id(factory: str, size: int) -> None:
    assert bytes_per_vector(factory, 768) == size


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "HNSW16", "HNSW32", "NSG16"])
def test_bytes_per_vector_equal_the_growth_of_the_file(rng, factory: str) -> None:
    def size(rows: int) -> int:
        index = faiss.index_factory(16, factory, faiss.METRIC_INNER_PRODUCT)
        vectors = rng.standard_normal((rows, 16)).astype(np.float32)
        index.train(vectors)
        index.add(vectors)
        return len(faiss.serialize_index(index))

    grown = (size(2000) - size(1000)) / 1000
    assert bytes_per_vector(factory, 16) == pytest.approx(grown, rel=0.1)


def test_the_explanation_is_one_line_with_the_cost() -> None:
    line = explain("IVF4096,Flat", 1_000_000, 768)
    assert line.startswith("IVF4096,Flat: ")
    assert "3080 bytes a vector, 2,949 MiB for 1,000,000 passages" in line
    assert "exact" in explain("Flat", 10, 8)
    assert ", 0.000305 MiB for 10 passages" in explain("Flat", 10, 8)
    assert "\n" not in line


@pytest.mark.parametrize(
    "factory",
    ["nonsense", "", "Flat,Flat", "IVF16", "PQ7", "LSH", "HNSW0", "IVF0,Flat", "IVF99999999999,Flat", "HNSW16,PQ8"],
)
def test_a_wrong_factory_is_refused_in_one_line_that_names_it(factory: str) -> None:
    with pytest.raises(InputError, match="factory ") as caught:
        bytes_per_vector(factory, 32)
    assert repr(factory) in str(caught.value)
    assert "\n" not in str(caught.value) and "/project/" not in str(caught.value)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("HNSW8_PQ8", "expected one of inner product, found one of Euclidean distance"),
        ("IDMap,Flat", "expected one without IDMap"),
        ("IVF4,Flat,IDMap2", "expected one without IDMap"),
    ],
)
def test_unsuitable_factory_strings_are_refused_with_a_reason(factory: str, message: str) -> None:
    with pytest.raises(InputError, match=f"'{factory}': {message}"):
        bytes_per_vector(factory, 32)


def test_missing_faiss_names_the_install_command(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match="pip install faiss-cpu"):
        import_faiss()
