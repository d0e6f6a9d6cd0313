"""Build entry point; all metadata and the list of packages are in pyproject.toml."""

from setuptools import setup

setup()
