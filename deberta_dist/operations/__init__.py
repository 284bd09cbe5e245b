"""Tools around runs and machines: calibration for the planner, and what benchmarks share."""
