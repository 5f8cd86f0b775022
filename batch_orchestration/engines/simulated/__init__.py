"""A simulated engine for tests and benchmarks: an HTTP server whose answers follow rules."""
