"""Parts that models are built from: fields, mlp, interactions of fields, attention, masks, experts."""
