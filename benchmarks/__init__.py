"""What surgeon reaches, how fast, and what it costs: `python -m benchmarks.FOLDER.NAME` writes results/NAME.md."""
