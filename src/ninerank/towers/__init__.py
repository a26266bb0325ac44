"""Ranking models: blocks, one file per published model, and the registry that builds them."""
