"""What the performance claims rest on. Every table prints the physical limit and the control beside the result."""
