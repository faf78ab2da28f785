"""Tests, and helpers that several of them share (tests.models)."""
