"""Dense small language models, upcycled to mixtures of experts and grown, without a loss spike."""
