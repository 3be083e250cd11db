"""Caches that lie behind a URL: fetched shard by shard into a bounded local directory, ahead of need."""
