"""The store: a DuckDB file with results, dead letters and statuses, and all access to it."""
