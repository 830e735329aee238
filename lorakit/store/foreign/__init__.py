"""Adapter files of other programs: one file a format, with PEFT's form in memory as the hub between them."""
