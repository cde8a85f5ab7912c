"""The training half: order, noise, loss, optimizer, LoRA, checkpoints."""
