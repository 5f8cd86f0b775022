"""The GPUs: what NVML says, the gate, faults, fences, heat, samples."""
