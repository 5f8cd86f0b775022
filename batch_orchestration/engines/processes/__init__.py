"""Processes of our own engines: start, record, log, end."""
