"""Tests of batch_orchestration, by how much of the world they need."""
