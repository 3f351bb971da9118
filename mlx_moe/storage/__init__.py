"""What lies on disk: written whole or not at all, locked while it is written, read with a schema."""
