"""Where a run could have gone another way: decisions of the model's Python code, and runs that add nothing to another one."""
