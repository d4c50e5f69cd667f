"""Stage 5: weights of 4 bits. GPTQ chooses them, kernels multiply with them, nothing else changes."""
