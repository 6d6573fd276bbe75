"""What a training run is: frozen dataclasses, read from YAML and from flags."""
