"""Which runs are needed next, and the queue file that everybody reads."""
