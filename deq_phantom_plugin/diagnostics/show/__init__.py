"""Shows the numbers that `measure` finds: as text, as a page with figures, and as advice."""
