"""Readers of labelled data: GLUE, SQuAD, multiple choice, tagging, tables."""
