"""OpenVLA's Hugging Face folders and the original experiment's checkpoints as bundles."""
