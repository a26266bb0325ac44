"""Parts that models are built from: fields, mlp, interaction, attention."""
