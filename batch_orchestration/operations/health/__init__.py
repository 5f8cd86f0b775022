"""Is all well, and if not, why and what helps."""
