"""Hidden states to chunks of logits to gradients."""
