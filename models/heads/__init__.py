"""Task heads over any encoder, their losses, and pooling."""
