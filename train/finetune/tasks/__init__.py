"""The fine-tuning tasks: how each is read, encoded, scored and shown."""
