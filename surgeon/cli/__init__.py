"""The command line -> calls of the API."""
