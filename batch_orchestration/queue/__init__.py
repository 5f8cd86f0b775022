"""The queue: entries, order of service, capacity, rate limits."""
