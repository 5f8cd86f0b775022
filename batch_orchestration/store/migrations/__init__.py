"""Numbered SQL files, each applied once, in order; an applied file is never edited."""
