"""Measured steps: what they say beyond the prices of their parts."""
