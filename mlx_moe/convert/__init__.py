"""Commands on models on disk: upcycle, grow and import, streamed tensor by tensor."""
