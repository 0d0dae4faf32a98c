"""The planning environment: a plan is decided step by step, among what still fits.

``instance`` is the contract: rows, groups, variants and cuts of one planning problem, and rooms
with the price of every plan. ``build`` makes instances of search contexts, ``toys`` by hand;
``placement`` is Gymnasium's ``meshwright/Placement-v0``, ``batched`` steps thousands of episodes.
"""
