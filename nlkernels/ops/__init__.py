"""One folder per operation, the same file names in each; see README.md for the anatomy."""
