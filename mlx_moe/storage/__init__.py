"""Files on disk: atomic writes, locks between processes, and reads checked against a schema."""
