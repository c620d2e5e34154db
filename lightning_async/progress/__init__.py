"""How far all members together have come, and where they stop together. No clock of its own, no Lightning."""
