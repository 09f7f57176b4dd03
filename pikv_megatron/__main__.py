"""`python -m pikv_megatron`: the same as the `pikv` command."""

import sys

from pikv_megatron.cli import main

sys.exit(main())
