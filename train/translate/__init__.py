"""Translation: training, running, scoring."""
