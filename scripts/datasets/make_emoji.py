"""Builds the bundled emoji from three npm packages, and unpacks them into training, dev and test sets."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from PIL import Image

from index.files import InputError, atomic_folder, read_json, sha256_file
from scripts import ROOT
from scripts.datasets.emoji_sets import ARTISTS, BUNDLED, NAMES_FILE, SETS, TILE, Emoji, names_file, sheet_of, unpack
from scripts.datasets.held_out import finish

PACKAGES = {
    "google": "emoji-datasource-google 16.0.0",
    "twitter": "emoji-datasource-twitter 16.0.0",
    "emojibase": "emojibase-data 17.0.0",
}
SOURCES = {
    ("google", "emoji.json"): "1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f",
    ("twitter", "emoji.json"): "1d602e65be88772bf8cc368ce16b855d719eeddbafe128d471b80203f494d29f",
    ("emojibase", "en/data.json"): "ed014f1049bd370c5794f815850156196ac382850f51c3e9f6a9e83553fb3f01",
    ("emojibase", "en/messages.json"): "6bffab078a0d90c4cca03bd3ff1045fdba33a77d31b1408b1cf1c414d7f1ab3c",
}
# Checksums of the names and bytes of the images, in the order of emoji.json.
IMAGES = {
    "google": "68bda8ace53960952456022f9d2382df7fd3d27f8d0d5f95822a3325567331ca",
    "twitter": "c83ec2f66e7351779aefbcc62df43f6cee83417413e95ceca0e02c72b0332277",
}

# Variants that look alike. If one were in training, the others would be no test.
GENDERS = re.compile(r"\b(wo)?m[ae]n\b|\b(person|people|boys?|girls?)\b")
FAMILIES = re.compile(r"^(family|kiss|couple with heart)\b.*")
DIRECTIONS = re.compile(r"\bfacing (left|right)\b")


def concept_of(name: str) -> str:
    """What an emoji shows, regardless of the person. Emoji of one concept fall into one split.

    "woman running facing right", "man running" and "person running" are "running"; "family: man, boy" is "family".
    """
    text = DIRECTIONS.sub("", FAMILIES.sub(r"\1", name.casefold()))
    return " ".join(re.findall(r"\w+", GENDERS.sub("", text))) or " ".join(re.findall(r"\w+", name.casefold())) or name


def split_of(concept: str) -> str:
    """Assign seven tenths of the concepts to train, one tenth to dev and two tenths to test, by a hash."""
    bucket = int.from_bytes(hashlib.sha256(concept.encode()).digest()[:8], "big") % 10
    return "test" if bucket < 2 else "dev" if bucket == 2 else "train"


def checked(folders: dict[str, Path]) -> dict[tuple[str, str], Any]:
    """Read the tables of the unpacked packages.

    Raises:
        InputError: a file is missing or from another version.
    """
    found = {}
    for (package, name), sha256 in SOURCES.items():
        path = folders[package] / name
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected the unpacked npm package {PACKAGES[package]}")
        if sha256_file(path) != sha256:
            raise InputError(f"{path}: expected that of {PACKAGES[package]} (sha256 {sha256[:12]}…), found another")
        found[package, name] = read_json(path)
    return found


def emoji_of(tables: dict[tuple[str, str], Any]) -> Iterator[tuple[Emoji, str]]:
    """Every emoji that both artists drew, in the order of emoji.json, with the file name of its image."""
    messages = tables["emojibase", "en/messages.json"]
    groups = {group["order"]: group["message"] for group in messages["groups"]}
    subgroups = {group["order"]: group["message"] for group in messages["subgroups"]}
    # The packages differ in where they write the variation selector.
    known = {row["hexcode"].replace("-FE0F", ""): row for row in tables["emojibase", "en/data.json"]}
    for row in tables["google", "emoji.json"]:
        if row["has_img_google"] and row["has_img_twitter"]:
            about = known[row["unified"].replace("-FE0F", "")]
            concept = concept_of(about["label"])
            yield (
                Emoji(
                    id=row["unified"].lower(),
                    name=about["label"],
                    keywords=tuple(about.get("tags", ())),
                    group=groups[about["group"]],
                    subgroup=subgroups[about["subgroup"]],
                    concept=concept,
                    split=split_of(concept),
                ),
                row["image"],
            )


def images_of(folder: Path, artist: str, names: list[str]) -> list[Image.Image]:
    """The images of an artist, in order.

    Raises:
        InputError: they are not those of the named version.
    """
    digest, found = hashlib.sha256(), []
    for name in names:
        content = (folder / "img" / artist / "64" / name).read_bytes()
        digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
        found.append(Image.open(io.BytesIO(content)).convert("RGBA"))
    if digest.hexdigest() != IMAGES[artist]:
        raise InputError(f"{folder}: expected the images of {PACKAGES[artist]}, found others ({digest.hexdigest()})")
    return found


def build(folders: dict[str, Path], out: Path) -> None:
    """Write the bundled folder: a sheet for each artist, the names, licenses and a README.

    Raises:
        InputError: a package is missing or has another version, or `out` contains other files.
    """
    ours = {"LICENSE", "README.md", NAMES_FILE, *(f"{artist}.webp" for artist in ARTISTS)}
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - ours):
        raise InputError(f"{out}: expected a new folder or one that this script wrote, found other files")
    rows = list(emoji_of(checked(folders)))
    emoji, names = [one for one, _ in rows], [name for _, name in rows]
    with atomic_folder(out) as folder:
        for artist in ARTISTS:
            sheet = sheet_of(images_of(folders[artist], artist, names), len(names))
            sheet.save(folder / f"{artist}.webp", quality=90, method=6)
        (folder / NAMES_FILE).write_bytes(names_file(emoji))
        apache = (ROOT / "LICENSE").read_text(encoding="utf-8")
        mit = [(folders[name] / "LICENSE").read_text(encoding="utf-8").strip() for name in ("google", "emojibase")]
        (folder / "LICENSE").write_text(LICENSE.format(datasource=mit[0], emojibase=mit[1], apache=apache))
        (folder / "README.md").write_text(readme_of(folder, emoji), encoding="utf-8")


def readme_of(folder: Path, emoji: list[Emoji]) -> str:
    """The README of the bundled folder, with counts and checksums."""
    names = gzip.decompress((folder / NAMES_FILE).read_bytes())
    sums = [f"{sha256_file(folder / f'{artist}.webp')}  {artist}.webp" for artist in ARTISTS]
    counts = Counter(one.split for one in emoji)
    concepts = Counter(split for _, split in {(one.concept, one.split) for one in emoji})
    return README.format(
        count=len(emoji),
        tile=TILE,
        subgroups=len({one.class_name for one in emoji}),
        rows="\n".join(f"| {split} | {concepts[split]:,} | {counts[split]:,} |" for split in ("train", "dev", "test")),
        sets="\n".join(
            f"| `{name}` | {artist} | {split} | {task} | {counts[split]:,} |"
            for name, (artist, split, task) in SETS.items()
        ),
        packages="\n".join(f"- {package}" for package in PACKAGES.values()),
        pack="\n    ".join(f"npm pack {package.replace(' ', '@')}" for package in PACKAGES.values()),
        sums="\n".join([*sums, f"{hashlib.sha256(names).hexdigest()}  {NAMES_FILE.removesuffix('.gz')}"]),
        sources="\n".join(f"{sha256}  {package}/{name}" for (package, name), sha256 in SOURCES.items()),
        images="\n".join(f"{sha256}  {artist}" for artist, sha256 in IMAGES.items()),
    )


README = """# Emoji
{count:,} emoji, each as an image by two artists ({tile} x {tile} pixels on white), with English names and keywords.

| split | concepts | emoji |
|---|---:|---:|
{rows}

Names and keywords are captions; {subgroups} sub-groups are classes. Whole concepts are held out: "man running", "woman
running facing right" and "person running" are one concept and fall into one split; so do all families.

| set | drawn by | concepts of | task | images |
|---|---|---|---|---:|
{sets}

The training set holds only Google's images of the train concepts. `held-out`: new concepts in the style of the training
set. `transfer`: concepts of the training set by another artist. `held-out-transfer`: new concepts by another artist.
`dev` is for tuning.

## Use
    python scripts/datasets/make_emoji.py unpack --out runs/emoji-data   # a training tar, the sets, each image
    scripts/emoji.sh                                                     # trains and evaluates, in minutes

## Sources
{packages}

Google's images are Noto Emoji (Apache-2.0), Twitter's are Twemoji (CC-BY-4.0, Copyright Twitter, Inc. and other
contributors), names, keywords and groups are emojibase's (MIT). LICENSE has the notices. The images here are
modified: placed on white, arranged on one sheet, compressed lossily (WebP).

## Build
    {pack}
    for name in emoji-datasource-google emoji-datasource-twitter emojibase-data; do
        mkdir $name && tar xzf $name-*.tgz -C $name --strip-components 1
    done
    python scripts/datasets/make_emoji.py build --google emoji-datasource-google --twitter emoji-datasource-twitter \\
        --emojibase emojibase-data --out scripts/datasets/data/emoji

- Selection: emoji that both artists drew, without skin tones. Order of emoji.json; tile n is in row n // 44, column
  n % 44.
- Concept: the name in lower case, without man, woman, person, boy, girl and their plurals, and without "facing left" or
  "facing right". All families are one concept, and so are all kisses and all couples with heart.
- Split: the first eight bytes of the concept's sha256, as a big-endian number, modulo 10; 0 and 1 are test, 2 is dev.
- The same packages give the same names everywhere, and the same sheets if Pillow is built with the same libwebp.

## Limitations
- One emoji in seven is a flag. The flag of a country cannot be found by its name without having seen it.
- All names come from one source. Other names of the same image are not among the captions.
- Keywords of different emoji overlap, so a caption may fit an image that counts as wrong.

## Checksums
sha256 of the files here (of the names, uncompressed):

```
{sums}
```

of the source tables, and of the names and checksums of the images:

```
{sources}
{images}
```
"""

LICENSE = """Google's images (google.webp): Noto Emoji, Copyright Google LLC, under the Apache License 2.0, which
follows below. https://github.com/googlefonts/noto-emoji

Twitter's images (twitter.webp): Twemoji, Copyright Twitter, Inc. and other contributors, under the Creative Commons
Attribution 4.0 International license, https://creativecommons.org/licenses/by/4.0/. https://github.com/jdecked/twemoji
Changes: placed on white, arranged on one sheet, compressed lossily.

Both were taken from the npm packages emoji-datasource-google and emoji-datasource-twitter:

{datasource}

Names, keywords, groups and sub-groups (emoji.jsonl.gz): emojibase-data

{emojibase}

The Apache License 2.0:

{apache}"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="make_emoji", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    whole = commands.add_parser("build", help="build the bundled folder from the unpacked npm packages")
    for name, package in PACKAGES.items():
        whole.add_argument(f"--{name}", type=Path, required=True, help=f"folder of {package}")
    part = commands.add_parser("unpack", help="write a training tar, the dev and test sets, and every image as a file")
    for command in (whole, part):
        command.add_argument("--out", type=Path, required=True, help="folder to write")
    given = parser.parse_args(arguments)
    if given.command == "build":
        folders = {name: getattr(given, name) for name in PACKAGES}
        return finish("make_emoji", lambda: build(folders, given.out), given.out)
    return finish("make_emoji", lambda: unpack(BUNDLED, given.out), given.out)


if __name__ == "__main__":
    sys.exit(main())
