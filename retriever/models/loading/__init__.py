"""Model folders: reading them, checking them, and adapting what they hold to a run."""
