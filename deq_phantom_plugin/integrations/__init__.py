"""Trainers that other packages bring: a file each, imported by its full name."""
