"""The files that run a hybrid and go with every checkpoint. Written out, so that none joins them unnoticed."""

TRAVELLING = (
    "cache_manticore.py",
    "chunk_scan_manticore.py",
    "configuration_manticore.py",
    "forward_manticore.py",
    "hollow_manticore.py",
    "mixing_manticore.py",
    "modeling_manticore.py",
    "saving_manticore.py",
    "scan_manticore.py",
    "sharing_manticore.py",
    "slicing_manticore.py",
)
