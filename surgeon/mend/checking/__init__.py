"""The small model runs beside the record of the original: which numbers of its code are wrong."""
