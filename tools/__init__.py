"""Programs besides the three main scripts; run one with `python -m tools.<name>`."""

import sys

from utils.interrupt import end_on_interrupt

if sys.argv[0] == "-m":  # the value while Python locates the program
    end_on_interrupt()  # the imports take seconds
