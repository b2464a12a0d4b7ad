"""Token scores and the choice of tokens: one definition for profiler and runtime."""
