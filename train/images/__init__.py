"""Training of image classifiers, and their predictions."""
