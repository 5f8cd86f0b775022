"""Reading a batch file: lines, chunks, and requests that no engine can answer."""
