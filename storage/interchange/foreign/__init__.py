"""Caches of other tools, as far as their files say enough, to caches of ours: docs/interchange.md."""
