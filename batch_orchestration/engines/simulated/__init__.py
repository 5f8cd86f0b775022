"""A simulated engine: an HTTP server with answers by rule, for tests and benchmarks."""
