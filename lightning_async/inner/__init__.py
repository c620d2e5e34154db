"""One member's own step, computed as tasks on a few threads: what BPT-CNN calls the inner layer."""
