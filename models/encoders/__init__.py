"""The encoders: BERT and its relatives, one file a family."""
