"""Where a model or a dataset comes from, and its license, as far as its own files say so."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from retriever.models.loading.hub import cached_model, split_revision

_SNAPSHOT = re.compile(r"models--(.+?)--(.+)")


@dataclass(frozen=True)
class BaseModel:
    """A model that another one was made from."""

    name: str
    """Hub name, or the last part of the path of a folder."""
    hub_name: str = ""
    """Hub name; "" for a folder that does not come from the hub."""
    revision: str = ""
    """Commit on the hub; "" if it is not known."""
    license: tuple[tuple[str, str], ...] = ()
    """Names and values of the license in the header of a card that the hub accepts; () if there is none."""

    def __str__(self) -> str:
        return f"{self.name}{f' (revision {self.revision})' if self.revision else ''}"


def base_model(path_or_name: str) -> BaseModel:
    """Return what is known about a model folder or hub name, without using the network."""
    folder = cached_model(path_or_name)
    if folder is None:
        name, revision = split_revision(path_or_name)
        return BaseModel(name, name if "/" in name else "", revision or "")
    metadata = card_metadata(folder / "README.md")
    # Snapshots in the cache of the hub are in models--OWNER--NAME/snapshots/COMMIT.
    snapshot = folder.absolute()
    if snapshot.parent.name == "snapshots" and (match := _SNAPSHOT.fullmatch(snapshot.parent.parent.name)):
        name = f"{match[1]}/{match[2]}"
        files = f"https://huggingface.co/{name}/blob/{snapshot.name}/"
        return BaseModel(name, name, snapshot.name, _license_header(metadata, files))
    resolved = folder.resolve()
    # A run writes its model to RUN/model.
    name = resolved.parent.name if resolved.name == "model" else resolved.name
    return BaseModel(name, license=_license_header(metadata, ""))


def _license_header(metadata: dict[str, object], files: str) -> tuple[tuple[str, str], ...]:
    """The license in a card's header: an identifier of the hub, or `other` with a name and a link.

    A link to a file beside the card becomes one to `files`, or is dropped where that is "".
    """
    license, name, link = (metadata.get(f"license{key}") for key in ("", "_name", "_link"))
    if isinstance(license, list) and len(license) == 1:
        (license,) = license
    if license is None and name is not None:
        license = "other"
    # The hub has identifiers; a remark is none.
    if not isinstance(license, str) or not license or " " in license:
        return ()
    if license != "other":
        return (("license", license),)
    if isinstance(link, str) and "://" not in link:
        link = files and files + link
    values = (("license", license), ("license_name", name), ("license_link", link))
    return tuple((key, str(value)) for key, value in values if value)


def license_of(path: Path) -> str:
    """Return the license that the card of a folder states, or that of the folder of a file; "" if there is none."""
    card = card_metadata((path if path.is_dir() else path.parent) / "README.md")
    license = card.get("license_name") or card.get("license")
    if isinstance(license, list):
        license = ", ".join(map(str, license))
    if license:
        return str(license)
    return "in its file LICENSE" if path.is_dir() and (path / "LICENSE").is_file() else ""


def common_license(bases: Iterable[BaseModel]) -> dict[str, str]:
    """Return the license that all models have, which a model made from them keeps; {} if there is none."""
    headers = {base.license for base in bases}
    return dict(headers.pop()) if len(headers) == 1 else {}


def dataset_license(hub_name: str) -> str:
    """Return the license of a dataset on the hub, if its card is in the cache; otherwise ""."""
    from huggingface_hub import try_to_load_from_cache

    try:
        card = try_to_load_from_cache(hub_name, "README.md", repo_type="dataset")
    except ValueError:
        # Not a valid name; opening the data reports it.
        return ""
    return license_of(Path(card).parent) if isinstance(card, str) else ""


def card_metadata(file: Path) -> dict[str, object]:
    """Return the YAML header of a model card or dataset card; {} if there is none or it cannot be read."""
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        header = text.split("\n---", 1)[0].removeprefix("---\n") if text.startswith("---\n") else ""
        content = yaml.safe_load(header)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
