"""The path of a dropped file to an admitted batch, or to a rejection with reasons."""
