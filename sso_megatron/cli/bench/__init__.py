"""``sso-megatron bench`` measures what optimizer steps cost, beside AdamW and Muon."""
