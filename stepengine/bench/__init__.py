"""Measures: workloads, paired timing, peers, the ladder. Nothing here is imported by the engine."""
