"""Attention and KV movement over the paged pool: a torch reference and Triton kernels."""
