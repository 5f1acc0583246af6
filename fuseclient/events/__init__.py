"""A volume's events: where they come from, whatever happens to the metaserver meanwhile, and how they are shown."""
