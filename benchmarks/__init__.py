"""Measurements of nlkernels against other implementations.

In a checkout `python -m benchmarks.NAME` runs a module from the repository root; `nlk bench`
imports this folder as `nlkernels.benchmarks`, which is also its name in an installation. Modules
import each other relatively, so that either name gives a whole package.
"""
