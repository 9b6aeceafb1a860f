"""Which architectures can be cut, recovered and exported, and whether the proof finds what is wrong."""
