"""Attaching adapters to any torch module, in place and undoable: targets, sites, switching, merging."""
