"""Stage one: corpus, teacher, the run over shards, and the audit of what was kept."""
