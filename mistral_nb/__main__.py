"""`python -m mistral_nb` is `mistral-nb`."""

from __future__ import annotations

import sys

from mistral_nb.cli import main

sys.exit(main())
