"""``sso-megatron render``: the flags of an experiment of ``configs/``."""
