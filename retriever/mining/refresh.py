"""Hard negatives of a training run that are mined again with its current weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from index.files import InputError, read_json, sha256_file, write_json
from index.progress import Reporter
from retriever.config.run import TrainConfig
from retriever.config.sources import SourceConfig
from retriever.data.table import ExampleTable, open_source
from retriever.distributed.agreement import ContentHash, check_same_on_ranks
from retriever.distributed.ranks import Ranks
from retriever.encoding.model import Model
from retriever.mining.mine import Places, mine_table
from retriever.mining.options import MiningOptions
from retriever.mining.parts import Workplace

FOLDER = "mined"
SUMS = "sums.json"


class NegativeRefresh:
    """Mines the hard negatives of all rows at steps 0, E, 2E, … of a run (ANCE, Xiong et al., arXiv 2007.00808).

    At step 0 only if a source has no hard negatives. The files of each mining stay in the run folder with their
    checksums, so that a resumed run reads what the interrupted one has read.

    Args:
        config: The configuration, with `mine_every` E.
        tables: The examples of each source.
        model: The model that is trained.
        run: The run folder.
        ranks: All ranks.

    Raises:
        InputError: A source has teacher's scores.
    """

    def __init__(
        self, config: TrainConfig, tables: Sequence[ExampleTable], model: Model, run: Path, ranks: Ranks
    ) -> None:
        assert config.mine_every is not None
        self._config, self._tables, self._model, self._ranks = config, list(tables), model, ranks
        self._every, self._run = config.mine_every, run
        self._from_start = not all(table.rows_with_negatives for table in tables)
        for table in tables:
            if table.rows_with_scores:
                raise InputError(
                    f"{table.name}: expected no teacher's scores with mine_every, because mined negatives have none, "
                    f"found them in {table.rows_with_scores:,} rows (scores: '' in data.sources reads no scores)"
                )

    def next_after(self, step: int) -> int:
        """Return the first step after `step` at which negatives are mined."""
        return (step // self._every + 1) * self._every

    def tables(self, step: int, reporter: Reporter, tick: Callable[[], None]) -> list[ExampleTable]:
        """Return the tables with the negatives in use at a step, which are mined now if the step is due.

        Every rank must call it, with the model in evaluation mode.

        Args:
            step: Number of steps done.
            reporter: Shows progress.
            tick: Called between micro-batches if there is a single rank; may raise to stop the mining.

        Raises:
            InputError: A file is damaged, or the files of an earlier step are missing.
        """
        mined_at = step // self._every * self._every
        if mined_at == 0 and not self._from_start:
            return self._tables
        folder = self._run / FOLDER / f"step-{mined_at:08d}"
        if not self._ranks.broadcast((folder / SUMS).exists()):
            if mined_at != step:
                raise InputError(f"{folder}: expected the hard negatives that were mined at this step, found none")
            self._mine(folder, step, reporter, tick)
        tables = []
        sums = read_json(folder / SUMS)
        for number, source in enumerate(self._config.data.sources):
            path = _file(folder, number)
            if not path.exists() or sha256_file(path) != sums.get(path.name):
                raise InputError(f"{path}: damaged: its checksum differs from that in {SUMS}, or it is missing")
            with self._ranks.first_rank_first():
                tables.append(open_source(_mined_source(source, path), folder / "cache"))
            if len(tables[-1]) != len(self._tables[number]):
                raise InputError(f"{path}: expected {len(self._tables[number])} rows, found {len(tables[-1])}")
        hashes = {f"mined negatives {i}": ContentHash(table.sha256, table.name) for i, table in enumerate(tables)}
        check_same_on_ranks(self._ranks, hashes)
        return tables

    def _mine(self, folder: Path, step: int, reporter: Reporter, tick: Callable[[], None]) -> None:
        mining = self._config.mining
        options = MiningOptions(
            mining.mined_negatives,
            mining.depth,
            mining.skip,
            mining.max_share,
            sampling=mining.sampling,
            # Another draw at each mining.
            seed=self._config.seed + step,
        )
        for number, (source, table) in enumerate(zip(self._config.data.sources, self._tables, strict=True)):
            workplace = Workplace(_file(folder, number), self._ranks)
            counts = mine_table(
                self._model,
                source,
                table,
                workplace,
                options,
                Places(),
                reporter,
                same_model=True,
                tick=tick if self._ranks.world_size == 1 else None,
            )
            few = f", {counts['short']:,} with fewer than {options.negatives}" if counts["short"] else ""
            reporter.line(f"step {step}: hard negatives of {counts['rows']:,} rows of {source.path} mined{few}")
        if self._ranks.is_first:
            paths = [_file(folder, number) for number in range(len(self._tables))]
            write_json(folder / SUMS, {path.name: sha256_file(path) for path in paths})
        self._ranks.barrier()


def _file(folder: Path, source: int) -> Path:
    return folder / f"source-{source}.jsonl"


def _mined_source(source: SourceConfig, path: Path) -> SourceConfig:
    """The source of a mined file: the columns of `example_line`, and the prompts of the source."""
    columns = SourceConfig(str(path))
    return replace(
        source,
        path=columns.path,
        format="jsonl",
        query=columns.query,
        positive=columns.positive,
        negatives=columns.negatives,
        # They are scores of the model that is trained.
        scores="",
    )
