"""Numbers in the code of a module: its methods in other words, or its forward as torch.fx traces it."""
