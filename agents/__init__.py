"""The learned planner; this version holds no code yet: plans come from meshwright.solvers."""
