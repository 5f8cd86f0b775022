"""The DuckDB file: results, dead letters, statuses; the only home of its tables."""
