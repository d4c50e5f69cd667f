"""Stage 3: attention in tiles, in our own Triton kernels."""
