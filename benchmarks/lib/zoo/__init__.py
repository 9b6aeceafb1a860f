"""Name -> a model with seeded random weights, and inputs for it; nothing is downloaded."""
