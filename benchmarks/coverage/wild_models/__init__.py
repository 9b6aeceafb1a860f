"""Small models of public kinds, one kind a file, written after the papers; `MODELS` of each file says how to make them."""
