"""Formats of public logs (criteo, libsvm, ...) and a synthetic log with a known ground truth."""
