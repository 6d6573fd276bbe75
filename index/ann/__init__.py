"""FAISS indexes: building, searching, changing and tuning them."""
