"""Change what lies on disk: upcycle, grow and import models, a piece at a time."""
