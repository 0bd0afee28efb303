"""``sso-megatron plan``: what the optimizer will do to every weight, before the run."""
