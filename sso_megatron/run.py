"""``python -m sso_megatron.run``: see ``sso_megatron.cli.train.run``."""

import sys

from sso_megatron.cli.train.run import main

if __name__ == "__main__":
    sys.exit(main())
