"""Supported versions of Megatron-Core, and every private name of it that this package relies on."""
