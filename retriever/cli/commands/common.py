"""What commands share: the flags of those that embed, checks, answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff

if TYPE_CHECKING:
    from index.progress import Reporter
    from retriever.encoding.encoder import EncodeOptions
    from retriever.models.images.towers import ImageTextTowers
    from retriever.models.towers import Towers

Switch = Annotated[bool, FlagCreatePairsOff]


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """What every command that embeds must know."""

    model: str
    """Model folder or hub name."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the tower. On a GPU bf16 is the fast one, with weights of bf16; elsewhere, and in fp16, autocast.
    Vectors of one are those of another but for rounding."""
    micro_batch_tokens: int | None = None
    """Tokens at once, padding included; empty: 4096 on a CPU, up to 262144 on a GPU, by its free memory."""
    device: str = "auto"
    """cpu, cuda, cuda:1 …; auto takes CUDA where there is one."""
    json: Switch = False
    """Print the answer as JSON."""

    def __post_init__(self) -> None:
        check_counts(self, "micro_batch_tokens")

    def towers(self, reporter: Reporter) -> Towers:
        """The model, in evaluation mode on the device; says where it is slower than most."""
        from retriever.models.images.folder import is_image_text_model
        from retriever.models.images.towers import load_image_text_towers
        from retriever.models.loading.hashes import known_sums
        from retriever.models.towers import load_towers
        from retriever.utils.check_progress import checking_bytes
        from retriever.utils.device import choose_device

        load = load_image_text_towers if is_image_text_model(self.model) else load_towers
        size = sum(path.stat().st_size for path in known_sums(self.model))
        with checking_bytes(reporter, Path(self.model).name, size) as checked:
            towers = load(self.model, choose_device(self.device), checked=checked)
        if note := towers.padding_note():
            reporter.line(note)
        return towers

    def picture_towers(self) -> ImageTextTowers:
        """The model, which must embed pictures too.

        Raises:
            InputError: it embeds texts alone.
        """
        from retriever.models.images.towers import load_image_text_towers
        from retriever.utils.device import choose_device

        return load_image_text_towers(self.model, choose_device(self.device))

    def options(self) -> EncodeOptions:
        """How texts pass through it."""
        from retriever.encoding.encoder import EncodeOptions

        return EncodeOptions(self.precision, self.micro_batch_tokens)


def check_counts(command: Any, *names: str) -> None:
    """Refuse fields below 1 (ValueError, naming the flag)."""
    for name in names:
        value = getattr(command, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")


def answer(as_json: bool, values: dict[str, Any]) -> None:
    """Print a command's answer on one line, for a person or as JSON."""
    if as_json:
        print(json.dumps(values))
    else:
        print("  ".join(f"{key} {value}" for key, value in values.items()))


def same_settings(name: str, command: Any, device: str, *without: str) -> dict[str, Any]:
    """What the processes of a torchrun that share a command must be given alike (retriever/distributed/agreement.py).

    Args:
        name: of the command.
        command: its dataclass.
        device: what --device or the configuration says.
        without: fields that each process may be given otherwise.
    """
    from retriever.distributed.agreement import settings_of
    from retriever.distributed.context import uses_gpus

    given = settings_of(command, without=without)
    flags = {f"--{field.replace('_', '-')}": value for field, value in given.items()}
    return {"command": name, "device": "cuda" if uses_gpus(device) else "cpu", **flags}
