"""Cached KV blocks between processes: found by key, lent under a lease, read by transport."""
