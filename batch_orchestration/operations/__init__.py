"""Health, alerts, metrics, housekeeping, recovery."""
