"""Stubs generated from proto/baton/v1 by tools/gen_proto.py. Do not edit."""
