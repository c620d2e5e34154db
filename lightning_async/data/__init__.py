"""Who trains on which samples of an epoch, in positions of one seeded order that all members share."""
