"""The kernel: value types and rules for batches and requests, and the exceptions; no I/O."""
