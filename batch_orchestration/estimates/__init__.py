"""How long a batch takes: profiles, costs, bands, scores."""
