"""Failures in virtual time: broken streams, lost peers, expired leases, random interleavings."""
