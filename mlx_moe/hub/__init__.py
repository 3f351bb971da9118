"""Reading and writing of models in Hugging Face's folder format."""
