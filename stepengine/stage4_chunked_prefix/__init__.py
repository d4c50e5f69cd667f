"""Stage 4: (a) prompts in chunks beside decodes, (b) K/V of equal beginnings found again, each selectable alone."""
