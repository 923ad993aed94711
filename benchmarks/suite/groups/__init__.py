"""The groups of the suite, one file each: `contests(settings)` yields what is to be measured."""
