"""Checking a volume and collecting its garbage: the store's side, beside what the metaserver knows of its engine."""
