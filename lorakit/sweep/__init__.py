"""Many adapters trained at once on one frozen base (lorakit.sweep.api.sweep)."""
