"""The groups of the suite, one file per group; its `contests(settings)` yields the contests."""
