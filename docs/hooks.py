"""What mkdocs does beside rendering: the generated reference, and links to files of the repository.

A page may link to any file of the repository, as GitHub shows it. Files outside docs/ are copied into the site under
`repository/`.
"""

from __future__ import annotations

import importlib
import posixpath
import re
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
COPIES = "repository"
# The target of a link or an image, without its anchor.
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, the style of code, and the files outside docs/ that pages link to."""
    sys.path[:0] = [str(ROOT), str(DOCS)]
    reference = importlib.import_module("reference_pages")
    files.append(File.generated(config, "reference/configuration.md", content=reference.configuration_page()))
    files.append(File.generated(config, "reference/cli.md", content=reference.command_page()))
    files.append(File.generated(config, "code.css", content=HtmlFormatter().get_style_defs(".highlight")))
    copied = set()
    for page in files.documentation_pages():
        for link in LINK.findall(page.content_string):
            target = repository_file(page.src_uri, link)
            if target and target not in copied:
                copied.add(target)
                files.append(File.generated(config, f"{COPIES}/{target}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to files outside docs/ point to their copies."""

    def replaced(match: re.Match[str]) -> str:
        target = repository_file(page.file.src_uri, match[1])
        if not target:
            return match[1]
        folder = posixpath.dirname(page.file.src_uri)
        return posixpath.relpath(f"{COPIES}/{target}", folder or ".")

    return LINK.sub(replaced, markdown)


def repository_file(page: str, link: str) -> str:
    """The path of a linked file below the repository's root; "" if it is a page of docs/ or an address.

    Args:
        page: The page that has the link, relative to docs/.
        link: The target as it is written.

    Raises:
        PluginError: The link leads to a folder, to a missing file or to a Markdown file outside docs/.
    """
    if "://" in link or link.startswith(("/", "mailto:")):
        return ""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    if path.startswith("docs/"):
        return ""
    if not (ROOT / path).is_file() or path.startswith("..") or PurePosixPath(path).suffix == ".md":
        raise PluginError(
            f"docs/{page}: expected a link to a page of docs/ or to a file of the repository, found {link}"
        )
    return path
