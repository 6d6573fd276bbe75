"""The configuration of a training run: frozen dataclasses, read from YAML and from flags."""
