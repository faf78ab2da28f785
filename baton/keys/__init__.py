"""API keys: made once and shown once; only their digests are kept, in a file or in Redis."""

from baton.keys.key import ApiKey, KeySet, digest_of, new_key

__all__ = ["ApiKey", "KeySet", "digest_of", "new_key"]
