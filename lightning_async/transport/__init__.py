"""Messages: the contract (`mail`), agreement (`rounds`), a `virtual` cluster and torch.distributed (`cluster`)."""
