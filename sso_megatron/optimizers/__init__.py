"""``torch.optim.Optimizer`` classes and their configurations; they run without Megatron."""
