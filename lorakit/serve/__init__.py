"""Serving: one base, many adapters. bank (who is resident), engine (who runs), app (HTTP)."""
