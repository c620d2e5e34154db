"""Mathematics: tensors and integers, one rank's view. No clock, thread, process or Lightning in here."""
