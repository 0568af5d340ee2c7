"""Grids of models, tasks, learning rates and seeds: run in parallel, cached by content, reported with intervals."""

from .. import load


load()
