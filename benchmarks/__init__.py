"""Measurements of nlkernels against other implementations. Not part of the installed package: run
from the repository root."""
