"""The rehearsal runs Megatron on a machine without a GPU: the same training, on the CPU over Gloo."""
