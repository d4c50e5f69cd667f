"""The part of the engine that no stage changes."""
