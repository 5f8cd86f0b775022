"""Output and error files, complete and partial."""
