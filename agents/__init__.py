"""The learned planner: a policy over ``meshwright.env``, and how it is trained."""
