"""Adapters on disk: the PEFT folder and what lorakit adds beside it; reading, checking, writing."""
