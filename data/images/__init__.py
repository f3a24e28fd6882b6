"""Images: reading them in the usual formats, preprocessing, augmentation, and batches by number."""
