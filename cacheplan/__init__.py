"""Profile a model, solve for a cache plan under a budget, apply it at inference."""

__version__ = "0.1.0"
