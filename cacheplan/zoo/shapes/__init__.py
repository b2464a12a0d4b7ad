"""The embedded diffusion model `shapes`: pictures of coloured shapes from short prompts."""
