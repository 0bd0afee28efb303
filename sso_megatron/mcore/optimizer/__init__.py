"""The optimizers in Megatron's factory, its training loop and its checkpoints."""
