"""`python -m moestro` is the command `moestro`."""

import sys

from moestro.cli import main

sys.exit(main())
