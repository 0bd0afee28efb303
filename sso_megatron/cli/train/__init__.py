"""The training script, the launcher of other scripts, and ``sso-megatron first-run``."""
