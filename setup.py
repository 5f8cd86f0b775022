"""Lets tools that look for a setup.py find one; every fact is in pyproject.toml."""

from setuptools import setup

setup()
