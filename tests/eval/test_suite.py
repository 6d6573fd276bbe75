"""BEIR sets are found on disk, downloaded completely or not at all, and averaged as in BEIR."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from eval.metrics import Metrics, evaluate_run
from eval.sets import download as download_module
from eval.sets.download import download
from eval.sets.plan import BEIR, BY_NAME, FORUMS, mean_of, plan, rows_of_tasks, suite_table
from index.files import InputError


def write_set(folder: Path, split: str = "test") -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": "", "text": "x"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "x"}\n')
    (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    return folder


def scored(value: float, queries: int) -> Metrics:
    qrels = {f"q{i}": {"a": 1} for i in range(queries)}
    hits = round(value * queries)
    return evaluate_run(qrels, {f"q{i}": {"a": 1.0} for i in range(hits)}, (10,))


def test_definitions_are_the_published_ones() -> None:
    assert len(BEIR) == 19 and len(BY_NAME) == 19
    assert sum(definition.md5 is not None for definition in BEIR) == 15
    assert {d.name for d in BEIR if d.md5 is None} == {"bioasq", "signal1m", "trec-news", "robust04"}
    assert all(len(definition.md5) == 32 for definition in BEIR if definition.md5)
    assert {definition.split for definition in BEIR if definition.name != "msmarco"} == {"test"}
    assert BY_NAME["msmarco"].split == "dev" and len(FORUMS) == 12


def test_every_set_of_the_benchmark_has_a_row(tmp_path: Path) -> None:
    write_set(tmp_path / "scifact")
    write_set(tmp_path / "msmarco", "dev")
    for forum in FORUMS:
        write_set(tmp_path / "cqadupstack" / forum)
    found = plan(["beir"], tmp_path)
    assert [(task.name, task.split) for task in found.tasks[:1]] == [("msmarco", "dev")]
    assert len(found.tasks) == 14 and len(found.absent) == 16
    rows = rows_of_tasks(
        found.tasks, {task.name: scored(1.0 if task.name == "msmarco" else 0.5, 4) for task in found.tasks}
    )
    table = suite_table(rows, found.absent).splitlines()
    assert len(table) == 2 + 19 + 2
    assert (
        "| set | queries | nDCG@10 |" in table
        and "| SciFact | 4 | 0.5000 |" in table
        and "| NQ | 3,452 | not here |" in table
    )
    assert "| BioASQ | 500 | not here (not public) |" in table
    # The means of BEIR's paper and of MTEB.
    assert table[-2:] == ["| mean of 2 sets | | 0.5000 |", "| mean of 3 sets, MS MARCO among them | | 0.6667 |"]


def test_the_mean_weights_sets_equally() -> None:
    mean = mean_of({"a": scored(1.0, 9), "b": scored(0.0, 1)})
    assert mean.mean["ndcg@10"] == 0.5
    assert len(mean.per_query) == 10 and mean.missing == ["b/q0"]
    assert mean.per_query["a/q3"]["ndcg@10"] == 1.0


def test_folders_names_and_folders_of_folders_are_found(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_set(tmp_path / "mine" / name)
    write_set(tmp_path / "home" / "scifact")
    found = plan([tmp_path / "mine", "scifact"], tmp_path / "home", "dev")
    assert [(task.name, task.row, task.split) for task in found.tasks] == [
        ("one", "one", "dev"),
        ("two", "two", "dev"),
        ("scifact", "scifact", "dev"),
    ]


def test_missing_folders_and_sets_are_one_line_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing: no such folder"):
        plan([tmp_path / "nothing"])
    with pytest.raises(InputError, match=r"scifact: no such folder, and the set of that name is not in .*home"):
        plan(["scifact"], tmp_path / "home")
    write_set(tmp_path / "cqadupstack" / "android")
    with pytest.raises(InputError, match="expected the 12 sets of cqadupstack, found no english"):
        plan([tmp_path / "cqadupstack"])
    write_set(tmp_path / "a" / "same")
    write_set(tmp_path / "b" / "same")
    with pytest.raises(InputError, match="different names, found same, same"):
        plan([tmp_path / "a" / "same", tmp_path / "b"])


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A local server with scifact.zip; the published md5 is replaced by that of the file."""
    folder = tmp_path / "served"
    folder.mkdir()
    write_set(tmp_path / "scifact")
    with zipfile.ZipFile(folder / "scifact.zip", "w") as archive:
        for path in sorted((tmp_path / "scifact").rglob("*")):
            archive.write(path, path.relative_to(tmp_path))
    md5 = hashlib.md5((folder / "scifact.zip").read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setitem(download_module.BY_NAME, "scifact", dataclasses.replace(BY_NAME["scifact"], md5=md5))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

        def copyfile(self, source: io.BufferedReader, outputfile: io.BufferedWriter) -> None:  # type: ignore[override]
            data = source.read()
            with contextlib.suppress(ConnectionError):
                outputfile.write(data[: len(data) // 2] if self.path.startswith("/torn/") else data)

        def translate_path(self, path: str) -> str:
            return super().translate_path(path.removeprefix("/torn"))

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


def test_a_set_is_downloaded_checked_and_evaluated_by_name(tmp_path: Path, mirror: tuple[str, Path]) -> None:
    seen: list[int] = []
    folder = download("scifact", tmp_path / "home", mirror=mirror[0], progress=seen.append)
    assert sum(seen) == (mirror[1] / "scifact.zip").stat().st_size
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["scifact"]
    assert plan(["scifact"], tmp_path / "home").tasks[0].folder == folder
    assert download("scifact", tmp_path / "home", mirror="http://127.0.0.1:9") == folder


def test_incomplete_or_wrong_downloads_leave_no_files(
    tmp_path: Path, mirror: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    with pytest.raises(InputError, match=r"scifact\.zip: cannot be downloaded: .*(early|read, )"):
        download("scifact", home, mirror=f"{mirror[0]}/torn")
    with pytest.raises(InputError, match=r"nfcorpus\.zip: cannot be downloaded: 404 File not found"):
        download("nfcorpus", home, mirror=mirror[0])
    with pytest.raises(InputError, match=r"cannot be downloaded: .*[Rr]efused"):
        download("scifact", home, mirror="http://127.0.0.1:9")
    monkeypatch.setitem(download_module.BY_NAME, "scifact", dataclasses.replace(BY_NAME["scifact"], md5="0" * 32))
    with pytest.raises(InputError, match=r"expected md5 0{32}, found [0-9a-f]{32}"):
        download("scifact", home, mirror=mirror[0])
    assert list(home.iterdir()) == []
    with pytest.raises(InputError, match="robust04: not public"):
        download("robust04", home)
    with pytest.raises(InputError, match="nope: expected a set of BEIR"):
        download("nope", home)


def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path, mirror: tuple[str, Path]) -> None:
    with zipfile.ZipFile(mirror[1] / "scifact.zip", "a") as archive:
        archive.writestr("scifact/../../evil", "x")
    md5 = hashlib.md5((mirror[1] / "scifact.zip").read_bytes(), usedforsecurity=False).hexdigest()
    download_module.BY_NAME["scifact"] = dataclasses.replace(BY_NAME["scifact"], md5=md5)
    with pytest.raises(InputError, match=r"expected files of scifact, found 'scifact/../../evil'"):
        download("scifact", tmp_path / "home", mirror=mirror[0])
    assert not (tmp_path / "evil").exists() and not (tmp_path / "home" / "scifact").exists()
