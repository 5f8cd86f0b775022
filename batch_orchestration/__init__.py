"""Dagster project that answers OpenAI batch files with vLLM and loses nothing on the way."""

__version__ = "0.1.0"
