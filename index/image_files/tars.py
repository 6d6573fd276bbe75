"""Members of tar files, as webdataset names them: the members of a sample have the same path up to the first dot."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from index.files import InputError
from index.image_files.folders import MAX_FILE_BYTES, is_hidden


@dataclass(frozen=True, slots=True)
class TarMember:
    """A regular file in a tar."""

    name: str
    offset: int
    """Position of its content."""
    size: int
    header: int
    """Position of its header."""
    fault: str = ""
    """Why its content cannot be read at `offset`; empty if it can."""

    @property
    def key(self) -> str:
        """The path up to the first dot of the file name."""
        return split_name(self.name)[0]

    @property
    def extension(self) -> str:
        """What follows the first dot of the file name, in lower case; it may contain further dots."""
        return split_name(self.name)[1]


def split_name(name: str) -> tuple[str, str]:
    """Split a path into the key of its sample and its extension, at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def tar_members(shard: Path) -> Iterator[TarMember]:
    """Yield the regular files of an uncompressed tar in constant memory; only headers are read.

    Hidden files are yielded too, see `index.image_files.folders.is_hidden`.

    Raises:
        InputError: the tar is missing, compressed, truncated or damaged.
    """
    try:
        size = shard.stat().st_size
        with tarfile.open(shard, "r:") as tar:
            last = -1
            for member in tar:
                # tarfile would keep all members in memory.
                tar.members = []  # type: ignore[attr-defined]
                if member.offset <= last:
                    raise tarfile.ReadError("a negative size leads back to an earlier member")
                last = member.offset
                if member.isreg():
                    yield TarMember(member.name, member.offset_data, member.size, member.offset, _fault(member, size))
            _check_end(shard, tar.offset)
    except FileNotFoundError:
        raise InputError(f"{shard}: no such file") from None
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{shard}: expected an uncompressed tar, found one that cannot be read: {reason:.200}"
        ) from None


def _check_end(shard: Path, offset: int) -> None:
    """Check that a tar ends where tarfile has stopped, which it also does at a damaged header.

    Raises:
        tarfile.ReadError: something follows.
    """
    with open(shard, "rb") as stream:
        stream.seek(offset)
        is_header = True
        while block := stream.read(tarfile.BLOCKSIZE if is_header else 2**20):
            if block.strip(b"\0"):
                what = "a damaged header" if is_header else "more data after the end of the archive"
                raise tarfile.ReadError(f"{what} at or after byte {offset}")
            is_header = False


def member_name(shard: Path, header: int) -> str:
    """Read the name of the member whose header is at a position of a tar.

    Raises:
        InputError: there is no header.
    """
    try:
        with open(shard, "rb") as stream:
            stream.seek(header)
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                member = tar.next()
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError, RecursionError, OSError) as error:
        raise InputError(f"{shard}: expected a tar header at {header}, found none: {error}") from None
    if member is None:
        raise InputError(f"{shard}: expected a tar header at {header}, found the end")
    return member.name


def visible_samples(shard: Path) -> Iterator[tuple[str, dict[str, TarMember]]]:
    """Yield (key, extension -> member) of each sample: adjacent members with the same key, as webdataset reads them.

    Raises:
        InputError: the tar cannot be read, a sample has two members of one extension, or a member cannot be read.
    """
    group: dict[str, TarMember] = {}
    last = ""
    for member in tar_members(shard):
        if is_hidden(member.name):
            continue
        if member.key != last and group:
            yield last, group
            group = {}
        last = member.key
        if member.extension in group:
            raise InputError(f"{shard}: {last}: expected one member .{member.extension}, found two")
        if member.fault:
            raise InputError(f"{shard}: {member.name}: expected a plain file, found {member.fault}")
        group[member.extension] = member
    if group:
        yield last, group


def _fault(member: tarfile.TarInfo, tar_bytes: int) -> str:
    if member.issparse():
        return "a sparse file"
    if member.size < 0:
        return "a negative size"
    if member.size > min(MAX_FILE_BYTES, tar_bytes - member.offset_data):
        return f"a member of {member.size:,} bytes, more than {MAX_FILE_BYTES:,} or than the tar has"
    return ""
