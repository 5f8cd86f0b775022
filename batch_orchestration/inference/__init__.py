"""One run: feeds the engine, records outcomes, commits chunks."""
