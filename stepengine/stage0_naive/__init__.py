"""Stage 0: no cache. Every step runs every token again; a batch is taken together and ends together."""
