"""The embedded language model: it recalls facts stated far back in its context."""
