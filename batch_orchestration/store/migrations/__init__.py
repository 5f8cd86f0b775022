"""Numbered SQL files, applied once each in order; an applied one is never edited."""
