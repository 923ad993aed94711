"""The contract: states, strategies, what they are told, and what can go wrong."""
