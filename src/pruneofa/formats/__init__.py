"""Folders and files, without torch: Hugging Face folders, patterns, scales, packed folders."""
