"""What ``sso-megatron plan`` finds out, by the code that a run builds its model and optimizer with."""
