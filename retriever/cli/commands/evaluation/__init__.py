"""Commands under `retriever evaluate`."""
