"""Hugging Face models: what a trained model becomes outside of this project, and back."""
