"""`retriever evaluate …`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from index.progress import Reporter
from retriever.cli.commands.common import Embedding, Switch, check_counts, same_settings


@dataclass(frozen=True, kw_only=True)
class EvaluateBeir(Embedding):
    """Score a model on BEIR folders: nDCG, MAP, recall, precision, MRR, R-cap and success, with run files and a
    report. The sets are checked first. Under torchrun all processes share the work."""

    data: tuple[str, ...]
    """BEIR folders, folders of them, names of BEIR's sets (scifact …), or beir for all of them."""
    out: Path
    """Folder of the report; embeddings found there are used again."""
    split: str | None = None
    """Which qrels; empty: test, and dev of MS MARCO."""
    k: int = 1000
    """Passages a query in the run; also the deepest cut-off of the measures."""
    home: Path | None = None
    """Where sets lie that --data names."""
    download: Switch = False
    """Fetch public sets that --data names into --home, checked against BEIR's sums."""
    mirror: str | None = None
    """Where to fetch from; empty: BEIR's own address."""
    preflight: Switch = False
    """Only check the sets: errors, warnings, lengths, an estimate of time, memory and disk."""
    allow_dangling: Switch = False
    """Go on where qrels judge passages (never found) or queries (score 0) that are not there."""
    keep_identical_ids: Switch = False
    """Rank passages that have their query's id and are not judged for it; BEIR leaves them out, trec_eval does not."""
    settings: Path | None = None
    """YAML file with prompts and maximum lengths by set (query_prompt, passage_prompt, query_max_length,
    passage_max_length), under the set's name or default."""
    windows: Switch = False
    """Score long documents by their best window, instead of cutting them at the model's maximum."""
    overlap: int = 32
    """Tokens that a window shares with the one before."""
    factory: str | None = None
    """Evaluate a FAISS index beside exact search, built by this factory string (auto, IVF1024,Flat …)."""
    index: Path | None = None
    """Evaluate this index beside exact search; it was built of the same corpus by the same model."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the vectors on disk."""
    shard_rows: int = 65536
    """Passages a shard; at most so many a process are lost when a run is killed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "k", "shard_rows")
        if not self.data:
            raise ValueError("--data: expected at least one BEIR folder, found none")
        if self.download and self.home is None:
            raise ValueError("--download: expected --home, the folder to bring sets to")
        if self.factory is not None and self.index is not None:
            raise ValueError("--factory: give a factory string or an index, not both")
        if self.overlap < 0:
            raise ValueError(f"--overlap: expected 0 or more, found {self.overlap}")

    def run(self, reporter: Reporter) -> int:
        from retriever.distributed.agreement import settings_of
        from retriever.distributed.context import SilentReporter, joined_ranks, own_device
        from retriever.evaluation.preflight import check_sets
        from retriever.evaluation.set_settings import read_settings, unused
        from retriever.evaluation.suite import Suite, SuiteOptions

        options = SuiteOptions(
            k=self.k,
            windows=self.windows,
            overlap=self.overlap,
            factory=self.factory,
            index=self.index,
            settings=read_settings(self.settings) if self.settings else {},
            dangling=self.allow_dangling,
            keep_identical_ids=self.keep_identical_ids,
            dtype=self.dtype,
            shard_rows=self.shard_rows,
        )
        paths = ("model", "data", "out", "home", "mirror", "settings", "index")
        same = same_settings("evaluate beir", self, self.device, *paths, "device", "json")
        same |= {"--index": self.index is not None}
        same |= {f"--{name}": value for name, value in settings_of(options).items() if name.startswith("settings")}
        with joined_ranks(same) as ranks:
            reporter = reporter if ranks.first else SilentReporter()
            plan = self._plan(ranks, reporter)
            for name in unused(options.settings, plan.tasks):
                reporter.line(f"warning: {self.settings}: no set here is called {name}")
            towers = self.towers(reporter)
            towers.to(own_device(towers.device))
            suite = Suite(towers, plan, self.out, self.options(), options, reporter, ranks)
            checked = check_sets(
                towers,
                plan,
                self.out,
                self.options(),
                options,
                reporter,
                thorough=self.preflight,
                processes=ranks.size,
            )
            if self.preflight:
                if self.json and ranks.first:
                    print(json.dumps({"sets": checked, "absent": plan.absent}))
                return 0
            found = suite.run({"model": self.model}, checked)
            if ranks.first:
                self._print(found, reporter)
        return 0

    def _plan(self, ranks: Any, reporter: Reporter) -> Any:
        from eval.sets.plan import plan

        if self.download and ranks.first:
            self._download(reporter)
        ranks.wait()
        return plan(self.data, self.home, self.split)

    def _download(self, reporter: Reporter) -> None:
        from eval.sets.download import MIRROR, download
        from eval.sets.plan import BEIR, BY_NAME, WHOLE

        assert self.home is not None
        public = [definition.name for definition in BEIR if definition.md5]
        asked = [name for entry in self.data for name in (public if entry == WHOLE else [entry])]
        for name in asked:
            if name in BY_NAME and not Path(name).is_dir() and not (self.home / name).is_dir():
                with reporter.bar(f"download {name}", None, "bytes") as advance:
                    download(name, self.home, mirror=self.mirror or MIRROR, progress=advance)

    def _print(self, found: Any, reporter: Reporter) -> None:
        from eval.approximate import approximation_table
        from eval.reports.markdown import comparison_table
        from eval.sets.plan import suite_table

        if self.json:
            print(json.dumps(found.as_json()))
            return
        print(comparison_table(found.rows, head="data"), end="")
        if found.approximations:
            print("\n" + approximation_table(found.exact, found.approximations, found.measure), end="")
        if found.absent or len(found.rows) > 1:
            print("\n" + suite_table(found.rows, found.absent, found.measure), end="")
        reporter.line(f"report: {self.out / 'report.md'}")
