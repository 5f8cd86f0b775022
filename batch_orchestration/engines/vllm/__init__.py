"""vLLM as a child server."""
