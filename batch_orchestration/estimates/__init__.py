"""Estimates of a batch's tokens, time and price: profiles, costs, bands, scores."""
