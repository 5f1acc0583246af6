"""The channel: the process that owns a mount, its rings and its BPF objects, and supervises the worker.

Its native half (``native/``) carries requests; this half starts, watches and ends what the mount is made of.
"""
