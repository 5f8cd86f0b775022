"""Processes of child servers: start, record, log, end."""
