"""How a batch ends: completed, cancelled, expired; and how it is resumed."""
