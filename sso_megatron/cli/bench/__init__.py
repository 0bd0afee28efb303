"""``sso-megatron bench``: what optimizer steps cost, beside AdamW and Muon."""
