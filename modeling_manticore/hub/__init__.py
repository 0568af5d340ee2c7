"""Sharing hybrids: recipes, plans, model cards, pushing to the Hub, and checking what is there."""

from .. import load


load()
