"""One decoder for Llama, Mistral, Qwen2 and Qwen3 checkpoints: configuration, operations, weights, catalogue."""
