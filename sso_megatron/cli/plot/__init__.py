"""``sso-megatron plot`` draws pictures of runs, and writes a report."""
