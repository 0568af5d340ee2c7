"""Data and tasks that hybrids are made, trained and measured on."""

from .. import load


load()
