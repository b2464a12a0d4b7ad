"""How to see a model: load it, describe it, and step into its attention."""
