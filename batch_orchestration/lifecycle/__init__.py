"""The end of a batch (completed, cancelled or expired) and its resumption."""
