"""Services that know nothing of equilibria, one per file. They are private to this package."""
