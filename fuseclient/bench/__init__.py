"""Measuring a file system through its mount: works that are timed, the processes that do them, figures and medians.

Nothing here knows which file system it measures. ``bpfuse bench`` and the repository's comparison with others both
stand on it.
"""
