"""``sso-megatron watch`` shows a run's losses, numbers and alarms while it trains."""
