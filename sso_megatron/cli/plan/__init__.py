"""``sso-megatron plan`` shows what the optimizer will do to every weight, before the run."""
