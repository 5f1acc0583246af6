"""What is told of a comparison: Markdown, plots, and the parts of the documentation that are made of them."""
