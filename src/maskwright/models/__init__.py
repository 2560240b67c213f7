"""Pretrained language models from folders, GGUF files and packages: found, loaded, evaluated, saved."""
