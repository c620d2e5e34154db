"""Messages: the contract (`mail`), agreement (`rounds`), a virtual cluster (`virtual`) and torch.distributed (`cluster`)."""
