"""What this machine has to say to each claim of the ledger: one function per claim, each of which runs the real thing.

Counts come from runs of a tiny model with random weights, from schedulers and caches without a model, and from the
interpreter that runs our kernels; times from a run of `Workbench.model`; what is only arithmetic says so.
"""
