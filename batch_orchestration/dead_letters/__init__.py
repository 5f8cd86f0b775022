"""Dead letters: replay and discard of failed requests."""
