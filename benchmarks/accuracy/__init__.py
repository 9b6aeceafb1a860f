"""What a cut costs on real data and weights, and what is won back."""
