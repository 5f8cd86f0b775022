"""Faults during a run: poison requests, and engines that die, hang, refuse or lack memory."""
