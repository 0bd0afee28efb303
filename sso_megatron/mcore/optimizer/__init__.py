"""The adapters by which our optimizers work in Megatron's factory, training loop and checkpoints."""
