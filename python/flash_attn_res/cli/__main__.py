"""`python -m flash_attn_res.cli`: the same as the command `flash-attn-res`."""

import sys

from flash_attn_res.cli import main

sys.exit(main())
