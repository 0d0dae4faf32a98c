"""How every operator may be sharded."""
