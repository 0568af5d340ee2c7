"""The workshop that makes hybrids: composing, calibrating, discretizing. Nothing that runs a hybrid imports it."""

from .. import load


load()
