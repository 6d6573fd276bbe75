"""`retriever push`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from index.progress import Reporter
from retriever.cli.commands.common import Switch


@dataclass(frozen=True, kw_only=True)
class Push:
    """Upload a model folder with its card to a repository of the Hugging Face Hub.

    The access token is that of `hf auth login` or of the environment variable HF_TOKEN.
    """

    model: Path
    """Model folder."""
    repo: str
    """Repository: owner/name. It is created if it does not exist."""
    public: Switch = False
    """Make a new repository public. By default it is private; an existing one stays as it is."""
    revision: str = "main"
    """Branch; it is created if it does not exist."""
    message: str = "Upload model"
    """Message of the commit."""
    dry_run: Switch = False
    """Check the folder, the card and the names, and list the files, without using the network."""
    json: Switch = False
    """Print the result as JSON."""

    def run(self, reporter: Reporter) -> int:
        from retriever.sharing.push import push

        pushed = push(
            self.model,
            self.repo,
            private=not self.public,
            revision=self.revision,
            message=self.message,
            dry_run=self.dry_run,
            progress=reporter,
        )
        if self.json:
            print(json.dumps({**dataclasses.asdict(pushed), "pinned": pushed.pinned}))
        elif self.dry_run:
            for name, size in pushed.files.items():
                print(f"{size:>15,}  {name}")
            kind = "public" if self.public else "private"
            print(f"would be pushed to {pushed.repo}, branch {pushed.revision} ({kind} if it is new)")
        else:
            print(f"{pushed.url}  load it with: {pushed.pinned}")
        return 0
