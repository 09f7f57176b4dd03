"""Build entry point. Metadata is in pyproject.toml; what only code can say (extensions) comes here."""

from setuptools import setup

setup()
