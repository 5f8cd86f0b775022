"""Decides which runs are needed next, and writes the queue file for all readers."""
