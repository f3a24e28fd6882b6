"""`bestiary plan`: compile the step of a training command for chips that are not there, and say what it takes."""
