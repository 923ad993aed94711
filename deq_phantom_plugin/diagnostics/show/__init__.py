"""How numbers are shown: as text, as a page, as advice; they come from `measure`."""
