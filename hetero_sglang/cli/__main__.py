"""`python -m hetero_sglang.cli` is `hetero-sglang`."""

from __future__ import annotations

import sys

from hetero_sglang.cli import main

sys.exit(main())
