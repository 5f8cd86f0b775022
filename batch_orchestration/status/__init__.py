"""Views of batches for people and clients."""
