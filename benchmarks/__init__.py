"""Measurements: each script prints one table, its variants timed side by side.

Run one with `python -m benchmarks.<name>`: `inference`, `table2`, `training`, `injection`, `end_to_end`, `scaling` and
`data_loading`. `sizes`, `segmentation` and `roofline` count instead, and need no clock; `gpu` runs all that concerns a
GPU. Every row is compared with a float64 result of the naive formulation before it is timed (rows that only load images
in `end_to_end`, with what the first number of workers loads; networks of timm, with themselves), and a row that differs
stops the run.
"""

import sys

from utils.interrupt import end_on_interrupt

if sys.argv[0] == "-m":  # as it reads while Python looks for the program to run
    end_on_interrupt()  # its imports take seconds
