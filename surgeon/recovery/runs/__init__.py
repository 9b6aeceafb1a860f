"""The original and the small model, side by side over all batches."""
