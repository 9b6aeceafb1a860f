"""Op by op: what a run computes, as a pure graph."""
