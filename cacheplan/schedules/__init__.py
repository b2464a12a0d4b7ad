"""From feature profiles and recipes to schedules: what is computed, and what serves the rest."""
