"""Runs the command line by `python -m deq_phantom_plugin.cli`."""

import sys

from . import main

sys.exit(main())
