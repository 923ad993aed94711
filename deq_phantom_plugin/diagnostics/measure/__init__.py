"""What is measured, as numbers; how they are shown is in `show`."""
