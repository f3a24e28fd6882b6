"""Examples of several tasks, of images and of texts, and batches of one task each."""
