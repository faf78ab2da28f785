"""Plain frozen values that pass between the parts of baton. No torch, no protobuf, no I/O."""
