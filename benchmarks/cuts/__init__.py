"""Other cuts than channels by score: what each brings, on the zoo."""
