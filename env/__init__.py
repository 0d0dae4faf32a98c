"""The planning environment; this version holds no code yet, and nothing depends on it."""
