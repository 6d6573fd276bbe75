"""Pairs of a folder of images for each class, whose captions are prompts with the name of the class."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from index.files import InputError
from index.image_files.classes import class_folders, is_template, prompt_of, read_prompts
from retriever.config.images import ImageSource
from retriever.data.images.pairs import RawPair, read_file, usable_captions

PROMPTS = ("a photo of a {c}.",)
"""Captions of a source without prompts, CLIP's (arXiv 2103.00020)."""


class ClassPairs:
    """The pairs of class folders. Every image has all prompts of its class as captions."""

    def __init__(self, source: ImageSource) -> None:
        """List the images.

        Raises:
            InputError: If there are no class folders with images, or a file that describes them is invalid.
        """
        self.source, self.name, self.folder = source, source.path, Path(source.path)
        classes = class_folders(self.folder)
        prompts = source.prompts or read_prompts([self.folder]) or PROMPTS
        for prompt in prompts:
            if not is_template(prompt):
                raise InputError(f"{source.path}: prompts: expected {{c}} in each of them, found none in {prompt!r}")
        self._captions = [
            tuple(prompt_of(prompt, name) for name in names for prompt in prompts) for names in classes.names
        ]
        self._files = [(number, file) for number, files in enumerate(classes.files) for file in files]
        self.notices, self.skipped = classes.notices, 0
        listed = [(self._captions[number], file.relative_to(self.folder).as_posix()) for number, file in self._files]
        self.sha256 = hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def location(self, row: int) -> str:
        """Return the path of the image."""
        return str(self._files[row][1])

    def read(self, row: int, with_image: bool = True) -> RawPair:
        """Return the pair of a row."""
        number, file = self._files[row]
        content = read_file(file) if with_image else b""
        return RawPair(content, usable_captions(self._captions[number], self, row), str(file), self, row)

    def images_sha256(self) -> str:
        """Return a sha256 of the list and of the size and modification time of every image file."""
        stats = (os.stat(file) for _, file in self._files)
        digest = hashlib.sha256(self.sha256.encode())
        for stat in stats:
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()
