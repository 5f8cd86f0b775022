"""The kernel: values and rules of batches and requests, and the exceptions; no I/O."""
