"""Reports as pages: one HTML file each, with its style, script and pictures inside, and nothing fetched."""

from .. import load


load()
