"""Embedding tables: merged storage, lookup of a batch, sparse optimizers."""
