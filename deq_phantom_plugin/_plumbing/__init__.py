"""What the rest stands on; nothing here is for users."""
