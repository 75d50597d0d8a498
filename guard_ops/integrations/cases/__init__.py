"""The calls on which each framework's functions are proved to be what ours replace."""
