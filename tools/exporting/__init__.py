"""Networks as graphs for other runtimes: what is exported, how it is written and run, and whether it is the same."""
