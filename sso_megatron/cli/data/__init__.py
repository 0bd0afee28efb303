"""``sso-megatron data`` turns text files into Megatron's indexed data sets."""
