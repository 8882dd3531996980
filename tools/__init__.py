"""Programs for users beside the three main scripts; run one with `python -m tools.<name>`."""
