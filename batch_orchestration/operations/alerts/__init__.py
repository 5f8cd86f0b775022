"""Alerts: findings, state, delivery over channels."""
