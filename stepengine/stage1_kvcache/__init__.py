"""Stage 1: (a) a K/V cache of contiguous slots, (b) continuous batching, each selectable alone."""
