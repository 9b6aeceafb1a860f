"""What a constant or a choice in the package was settled by."""
