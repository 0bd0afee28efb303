"""Trains: ``torchrun ... -m sso_megatron.pretrain_gpt <any Megatron flags> --optimizer sso``."""

from sso_megatron.cli.train.pretrain_gpt import main

if __name__ == "__main__":
    main()
