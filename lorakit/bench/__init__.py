"""Measurements against what else there is, side by side in one process: what `lorakit bench` runs."""
