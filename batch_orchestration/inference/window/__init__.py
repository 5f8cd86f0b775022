"""The window: how many requests the engine gets at a time."""
