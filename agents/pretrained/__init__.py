"""The planner that comes with the package: weights and their card."""
