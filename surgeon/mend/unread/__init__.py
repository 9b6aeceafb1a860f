"""Numbers that say a width and that no recorded run reads: which of them follow the new widths."""
