"""Roofline by op, from traces of torch.profiler: where a GPU's time went, what it computed and moved, how near the roof."""
