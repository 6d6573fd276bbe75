"""Towers: tokenizers, text and image encoders, their memory and arithmetic."""
