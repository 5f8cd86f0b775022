"""The data folder: paths, atomic writes, kept input, journals."""
