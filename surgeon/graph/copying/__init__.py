"""A model copied so that nothing of the first one can be reached from the copy."""
