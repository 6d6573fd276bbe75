"""The commands: each is a dataclass whose fields are its flags and whose `run` does the work."""
