"""Features of a pretrained encoder: vectors and cheap heads on them."""
