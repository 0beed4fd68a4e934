"""A job module that cannot be imported."""

raise ImportError("no module named tensorflow")
