"""What keeps the run of a model from leaving traces: in its tensors, in what it holds, in generators."""
