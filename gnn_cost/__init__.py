"""The learned cost model; this version holds no code yet: costs are analytic (meshwright.cost)."""
