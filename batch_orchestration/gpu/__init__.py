"""GPUs: readings from NVML, the gate, faults, fences, throttling, samples."""
