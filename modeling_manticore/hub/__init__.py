"""Sharing hybrids: model cards, licences and pictures."""
