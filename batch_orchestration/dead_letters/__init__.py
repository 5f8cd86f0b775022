"""Failed requests: replay and discard."""
