"""Training: one loop, its loss, its schedule, and the one object that holds its state."""
