"""Fine-tuning: one loop over tasks."""
