"""Whether a gradient is right: reports on a user's own model, and the theorems' conditions."""
