"""Engines: whatever answers requests, behind one small protocol."""
