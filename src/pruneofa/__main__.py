"""`python -m pruneofa`, which torchrun needs."""

import sys

from pruneofa.cli.main import main

sys.exit(main())
