"""A Megatron model's parameters: global names, logical matrices, initial weights."""
