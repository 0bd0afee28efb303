"""``sso-megatron data``: text files as Megatron's indexed data sets."""
