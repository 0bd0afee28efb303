"""``sso-megatron watch``: a run's losses, numbers and alarms while it trains."""
