"""From a plan to local programs: placements, redistributions, lowering, schedules."""
