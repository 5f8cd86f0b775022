"""All that touches the disk: the data folder, the journals and the store; all SQL is here."""
