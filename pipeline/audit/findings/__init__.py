"""The tests of an audit: each a named statistic with the chance that a sound cache shows as much (docs/audit.md)."""
