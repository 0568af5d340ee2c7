"""Sharing hybrids: pushing them to the Hub, and checking what is there."""
