"""Stories of runs that never were, for pictures and pages: as many ranks as wanted, the last one slow."""

from __future__ import annotations

import random
from collections import Counter

from lightning_async.cli.story import Piece, Story


def invented(world: int, seed: int = 0) -> Story:
    """Three epochs of a second; neighbours on a ring write to each other."""
    draw = random.Random(seed)
    story = Story(world=world, strategy="gossip_ring", knobs={"max_delay": 1000, "balance": "claim"})
    for rank in range(world):
        slow = 4.0 if rank == world - 1 else draw.uniform(0.95, 1.1)
        step = 0.02 * slow
        story.pieces[rank] = []
        for epoch in range(3):
            begin, end = epoch * 1.2, epoch * 1.2 + draw.uniform(0.95, 1.0)
            while begin + step <= end:
                spent = step * draw.uniform(0.9, 1.1)
                story.pieces[rank].append(Piece(begin, begin + spent, spent * draw.uniform(0.05, 0.2), 0.0))
                story.steps[rank] += 1
                story.samples[rank] += 8
                begin += spent
            story.pieces[rank].append(Piece(begin, epoch * 1.2 + 1.05, 0.0, epoch * 1.2 + 1.05 - begin))
        late = 6 if rank == world - 1 else 1
        story.delays[rank] = Counter(min(200, int(draw.expovariate(1 / late)) + 1) for _ in range(story.steps[rank]))
        for peer in {(rank + 1) % world, (rank - 1) % world} - {rank}:
            sent = draw.uniform(0.8, 1.0) * 3e8 / slow
            story.links[rank, peer] = {"ask": (sent, 400), "answer": (0.9 * sent, 390), "headers": (1e5, 800)}
    story.fates = Counter(folded=sum(counts.total() for counts in story.delays.values()), refused=3)
    story.spread = [(1.05, 0.03), (2.25, 0.021), (3.45, 0.017)]
    story.sketches = [(at / 4, 0.03 + 0.01 * draw.random()) for at in range(1, 14)]
    story.losses["training loss"] = [(at / 100, 2.0 / (1 + at / 40) + 0.1 * draw.random()) for at in range(340)]
    story.losses["val_loss"] = [(1.1, 1.1), (2.3, 0.7), (3.5, 0.52)]
    return story
