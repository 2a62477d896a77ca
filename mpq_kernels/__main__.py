"""`python -m mpq_kernels` is the command `mpq`."""

import sys

from .cli import main

sys.exit(main())
