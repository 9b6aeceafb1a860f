"""What the benchmarks share: result files, rows in processes of their own, data, the rival's needs, a zoo of models."""
