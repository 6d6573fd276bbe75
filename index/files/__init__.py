"""Files on disk: atomic writes, locks, checksums, JSON, free space, and the errors that name a file and a line."""

from index.files.atomic import atomic_folder, atomic_path, recover_folder
from index.files.checksums import HASH_THREADS, sha256_file, sha256_files
from index.files.errors import ArgumentError, ConfigError, InputError, escape_control
from index.files.json_files import parse_json, read_json, write_json
from index.files.locks import fsync_folder, locked_folder
from index.files.reading import MAX_LINE, check_readable, open_binary, read_at

__all__ = [
    "HASH_THREADS",
    "MAX_LINE",
    "ArgumentError",
    "ConfigError",
    "InputError",
    "atomic_folder",
    "atomic_path",
    "check_readable",
    "escape_control",
    "fsync_folder",
    "locked_folder",
    "open_binary",
    "parse_json",
    "read_at",
    "read_json",
    "recover_folder",
    "sha256_file",
    "sha256_files",
    "write_json",
]
