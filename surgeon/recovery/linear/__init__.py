"""The linear equations of one layer, and their least-squares solution."""
