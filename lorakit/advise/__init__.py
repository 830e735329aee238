"""Which ranks, and which matrices: advice from an adapter's spectrum, or from a short sweep on the user's data."""
