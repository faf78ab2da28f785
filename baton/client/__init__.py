"""A small typed client over HTTP. No torch, no gRPC."""
