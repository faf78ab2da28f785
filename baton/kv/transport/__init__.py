"""Ways to read another process's KV blocks: nixl, nccl, shm, loopback, under one protocol."""
