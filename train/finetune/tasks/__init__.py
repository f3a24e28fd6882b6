"""Fine-tuning tasks: reading, encoding, scoring and showing their examples."""
