"""What a mount tells of itself: figures, typed and as tables."""
