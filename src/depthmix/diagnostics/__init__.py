"""What a network does in depth: the paper's figures and more, from any checkpoint."""
