"""Plans a run for ``sso-megatron plan``, by the code that the run builds its model and optimizer with."""
