"""Training: recipe, data pipeline, loss, optimizers, checkpoints, and the loop that joins them."""
