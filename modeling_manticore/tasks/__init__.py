"""Data and tasks that hybrids are made, trained and measured on."""
