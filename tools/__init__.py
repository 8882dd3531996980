"""Programs for users beside the three main scripts; run one with `python -m tools.<name>`."""

import sys

from utils.interrupt import end_on_interrupt

if sys.argv[0] == "-m":  # as it reads while Python looks for the program to run
    end_on_interrupt()  # its imports take seconds
