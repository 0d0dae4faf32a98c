"""What a plan may be: the choices a context allows, what they cost, and how they become a plan.

``search`` holds what solvers and agents share (``SearchContext``, ``Candidate``, ``Proposer``),
``skeletons`` says what there is to choose, ``decision`` what was chosen, ``evaluate`` prices
thousands of decisions a second, ``decided`` writes one down as a plan.
"""
