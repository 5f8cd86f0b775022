"""The rules: what a batch, a request, a chunk and an outcome are. No I/O, no Dagster, no vLLM."""
