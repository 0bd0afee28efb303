"""``sso-megatron plot``: pictures of runs, and a report."""
