"""The deployment's health: its problems, their reasons and the next commands."""
