"""Starts ``python -m sso_megatron.run``, which ``sso_megatron.cli.train.run`` implements."""

import sys

from sso_megatron.cli.train.run import main

if __name__ == "__main__":
    sys.exit(main())
