"""Commands that share models: push and export."""
