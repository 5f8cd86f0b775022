"""How many requests the engine gets at a time."""
