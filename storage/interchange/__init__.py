"""A cache as Parquet, Arrow IPC or a saved `datasets` folder, one row per sequence, and back without losing a bit."""
