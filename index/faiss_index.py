"""FAISS indexes of passages: `build` makes one from an embedding store, `Index` opens it and searches."""

from __future__ import annotations

from index.building import build
from index.opened import Index

__all__ = ["Index", "build"]
