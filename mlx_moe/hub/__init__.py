"""Models in the folders of Hugging Face: in, and out."""
