"""Training of one model for several tasks, of images and of texts, and its predictions."""
