"""Mining of hard negatives: `retriever mine` against `mine_hard_negatives` of sentence-transformers.

    python scripts/benchmarks/retriever/bench_mining.py --device cuda --precision bf16 --rows 100000
    python scripts/benchmarks/retriever/bench_mining.py --device cpu --rows 2000

Both take the same model, pairs and settings: 100 candidates of each query by exact search in the union of the
positives, those above 95 % of the positive's score dropped, the best 3 taken. Ours reads JSON lines and writes JSON
lines with scores and checks a store on disk; theirs works in memory. Both run once on a tenth of the rows before they
are measured. In fp32 the share of rows with the same negatives is printed, and must be at least 99 %. Rows are written
to mining.csv.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import retriever
from scripts import RESULTS
from scripts.benchmarks.arguments import add_model_argument
from scripts.benchmarks.machine import machine
from scripts.benchmarks.result_rows import update_rows
from scripts.benchmarks.timing import peak_mib, reset_peak_memory

NEGATIVES, DEPTH, MAX_SHARE = 3, 100, 0.95
Pairs = list[tuple[str, str]]
Mined = dict[str, list[str]]


def main() -> None:
    """Measure both and write the rows."""
    options = parse_arguments()
    pairs = distinct_pairs(options.data, options.rows)
    results = []
    mined: dict[str, Mined] = {}
    for name, mine in (("retriever", ours), ("sentence-transformers", theirs)):
        mine(options, pairs[: max(100, len(pairs) // 10)])
        reset_peak_memory()
        start = time.perf_counter()
        mined[name] = mine(options, pairs)
        seconds = time.perf_counter() - start
        results.append(
            {
                **machine(),
                "method": name,
                "model": Path(options.model).name,
                "precision": options.precision,
                "rows": len(pairs),
                "seconds": f"{seconds:.2f}",
                "rows_per_second": f"{len(pairs) / seconds:.1f}",
                "peak_mib": f"{peak_mib():.0f}",
            }
        )
        print(f"{name}: {seconds:.2f} s, {len(pairs) / seconds:,.0f} rows/s", flush=True)
    one, other = mined.values()
    full = [query for query in one if len(one[query]) == NEGATIVES == len(other.get(query, []))]
    same = sum(one[query] == other[query] for query in full) / max(1, len(full))
    print(f"rows with {NEGATIVES} negatives in both: {len(full):,}; equal: {same:.2%}")
    if options.precision == "fp32" and same < 0.99:
        raise SystemExit("the negatives differ: nothing is written")
    update_rows(results, RESULTS / "mining.csv", ("hardware", "method", "model", "precision", "rows"))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", help="cpu or cuda (default: %(default)s)")
    add_model_argument(parser)
    parser.add_argument(
        "--data", type=Path, required=False, help="pairs as .jsonl (default: the bundled WordNet verbs)"
    )
    parser.add_argument("--rows", type=int, default=100_000, help="number of rows, at most (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(default: %(default)s)")
    parser.add_argument("--their-batch", type=int, default=256, help="texts per batch of theirs (default: %(default)s)")
    options = parser.parse_args()
    if options.data is None:
        from scripts import ROOT

        options.data = ROOT / "scripts" / "datasets" / "data" / "wordnet"
    return options


def distinct_pairs(data: Path, rows: int) -> Pairs:
    """The first pairs of a source whose queries and positives are all distinct, so that both miners see the same."""
    from retriever.config.sources import SourceConfig
    from retriever.data.sources import Notices, read_examples

    queries: set[str] = set()
    passages: set[str] = set()
    pairs: Pairs = []
    for example in read_examples(SourceConfig(str(data)), Notices()):
        query, passage = example.query, example.positives[0]
        keys = " ".join(query.casefold().split()), " ".join(passage.casefold().split())
        if keys[0] in queries or keys[1] in passages:
            continue
        queries.add(keys[0])
        passages.add(keys[1])
        pairs.append((query, passage))
        if len(pairs) == rows:
            break
    return pairs


def ours(options: argparse.Namespace, pairs: Pairs) -> Mined:
    """Mine with `retriever.mine`."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "pairs.jsonl", Path(folder) / "hard.jsonl"
        path.write_text("".join(json.dumps({"query": q, "positive": p}) + "\n" for q, p in pairs), encoding="utf-8")
        retriever.mine(
            options.model,
            path,
            out,
            negatives=NEGATIVES,
            depth=DEPTH,
            max_share=MAX_SHARE,
            device=options.device,
            precision=options.precision,
        )
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return {row["query"]: row["negatives"] for row in rows}


def theirs(options: argparse.Namespace, pairs: Pairs) -> Mined:
    """Mine with sentence-transformers."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    settings: dict[str, Any] = {"device": options.device, "model_kwargs": {"dtype": dtype}}
    mine: Callable[..., Dataset] = mine_hard_negatives
    found = mine(
        Dataset.from_dict({"query": [q for q, _ in pairs], "positive": [p for _, p in pairs]}),
        SentenceTransformer(options.model, **settings),
        range_max=DEPTH,
        relative_margin=1 - MAX_SHARE,
        num_negatives=NEGATIVES,
        sampling_strategy="top",
        output_format="triplet",
        batch_size=options.their_batch,
        verbose=False,
    )
    mined: Mined = {}
    for query, negative in zip(found["query"], found["negative"], strict=True):
        mined.setdefault(query, []).append(negative)
    return mined


if __name__ == "__main__":
    main()
