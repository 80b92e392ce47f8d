"""`python -m pruneofa.cli`, which torchrun needs."""

import sys

from pruneofa.cli.main import main

sys.exit(main())
