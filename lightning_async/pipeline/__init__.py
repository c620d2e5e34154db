"""The delayed-gradient pipeline: a network cut into stages that never wait for each other's backward pass."""
