"""Training only some parameters of a model, or some of its layers more slowly: shared by the jobs that fine-tune."""
