"""``sso-megatron render`` prints the flags of an experiment of ``configs/``."""
