"""Stage 2: K/V in small blocks that are taken one by one, shared, copied on a write, and given up under pressure."""
