"""Use cases over engine and store."""
